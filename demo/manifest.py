"""The miniature as `world.json` describes it: its LoRAs, their prompts, and the words that the base knows."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from .graphs import Learned


@dataclasses.dataclass(frozen=True)
class Trained:
    """One LoRA of the miniature. `name` is the judge's class, `gates` the prompts that try it out."""

    name: str
    identifier: str
    learned: Learned
    gates: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Files, sizes and words of the miniature. `held_out`: (shape, style) pairs that the base never saw."""

    checkpoint: str
    judge: Path
    size: int
    pair_prompt: str
    shapes: list[str]
    colours: list[str]
    known_styles: list[str]
    subject_picture_styles: list[str]
    unseen_shapes: list[str]
    held_out: set[tuple[str, str]]
    subjects: list[Trained]
    styles: list[Trained]

    def prompt(self, subject: Trained, style: Trained) -> str:
        """The prompt that asks for a subject in a new style."""
        return self.pair_prompt.format(content=subject.identifier, style=style.identifier)


def read_manifest(folder: Path | None = None) -> Manifest:
    """The manifest of the shipped miniature, or of the one that ZIPLORA_MINIATURE names.

    Raises FileNotFoundError where there is none.
    """
    folder = folder or Path(os.environ.get("ZIPLORA_MINIATURE") or Path(__file__).parent).resolve()
    raw = json.loads((folder / "world.json").read_text(encoding="utf-8"))
    of_kind: dict[str, list[Trained]] = {"content": [], "style": []}
    for entry in raw["loras"].values():
        of_kind[entry["kind"]].append(_trained(entry))
    return Manifest(
        checkpoint=Path(raw["checkpoint"]).name,
        judge=folder / raw["judge"],
        size=raw["size"],
        pair_prompt=raw["pair_prompt"],
        shapes=raw["base_shapes"],
        colours=raw["base_colours"],
        known_styles=raw["base_styles"],
        subject_picture_styles=raw["subject_picture_styles"],
        unseen_shapes=raw["unseen_shapes"],
        held_out={(shape, style) for shape, style in raw["held_out"]},
        subjects=of_kind["content"],
        styles=of_kind["style"],
    )


def _trained(entry: dict[str, Any]) -> Trained:
    # The base directory links every folder of pictures into the server's input folder.
    picture = Path(entry["pictures"][0]).relative_to("pictures").as_posix()
    learned = Learned(Path(entry["file"]).name, picture, entry["training_prompt"])
    return Trained(entry["judge_class"], entry["identifier"], learned, entry["gate_prompts"])
