"""A miniature as its `world.json` describes it: files, LoRAs with their prompts, and the words that its base knows."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .graphs import Learned


@dataclasses.dataclass(frozen=True)
class Trained:
    """One LoRA.

    name: the judge's word for it. words: how prompts name it: "a zub figure", or "in cedo style". of_class: the
    same without its identifier: "a figure". shows: the judge's word for the subject of its first picture. pictures: of
    reference, below the miniature's folder, each with one of the prompts.
    """

    name: str
    kind: str
    identifier: str
    words: str
    of_class: str
    shows: str
    learned: Learned
    pictures: Sequence[str]
    prompts: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Asked:
    """A prompt, and the judge's words for what would be right (None: any).

    design: whether a subject that a LoRA teaches must be that drawing of it, and not another one.
    """

    prompt: str
    subject: str | None
    style: str | None
    design: bool = True


@dataclasses.dataclass(frozen=True)
class Shown:
    """What demo and thumbnails show: names of LoRAs, words of the base.

    pair: a subject and a style. third: another subject. whole: a subject and a style that stand in one picture.
    """

    pair: tuple[str, str]
    third: str
    whole: tuple[str, str]
    new_style: str
    new_subject: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A miniature.

    designs: of a subject that a LoRA teaches, the set whose drawing it is. other_styles: those that the base knows and
    the subjects' pictures lack. known: prompts of the base's own words. unseen: what the styles' pictures do not show,
    as prompts name it, and the judge's word. untold: subjects and styles of LoRAs that no true picture shows together.
    quick: pairs to look at first, which two loaders spoil. blocks: "content" and "style", starts of layer names, by
    what they draw.
    """

    folder: Path
    checkpoint: str
    judge: Path
    size: int
    designs: dict[str, str]
    other_styles: list[str]
    known: list[Asked]
    unseen: list[tuple[str, str]]
    untold: set[tuple[str, str]]
    quick: list[tuple[str, str]]
    blocks: dict[str, tuple[str, ...]]
    shown: Shown
    subjects: list[Trained]
    styles: list[Trained]

    def prompt(self, subject: Trained, style: Trained) -> str:
        """Asks for a subject in a new style."""
        return f"{subject.words} {style.words}"

    def alone(self, subject: Trained) -> Asked:
        """A subject by its own prompt."""
        return Asked(subject.learned.prompt, subject.name, None)

    def restyled(self, subject: Trained, style: str) -> Asked:
        """A subject in a style that the base knows."""
        return Asked(f"{subject.words} in {style} style", subject.name, style)

    def on_unseen(self, style: Trained, number: int) -> Asked:
        """A style on one of the subjects that its pictures lack, which take turns."""
        words, subject = self.unseen[number % len(self.unseen)]
        return Asked(f"{words} {style.words}", subject, style.name)

    def pairs(self) -> list[tuple[Trained, Trained]]:
        """Every subject with every style, where there is a truth of both."""
        every = itertools.product(self.subjects, self.styles)
        return [(a, b) for a, b in every if (a.name, b.name) not in self.untold]

    def trained(self) -> dict[str, Trained]:
        """Every LoRA by name."""
        return {one.name: one for one in (*self.subjects, *self.styles)}


def read_manifest(folder: Path | None = None) -> Manifest:
    """The manifest of the shipped miniature, or of the one that ZIPLORA_MINIATURE names.

    Raises FileNotFoundError where there is none.
    """
    folder = folder or Path(os.environ.get("ZIPLORA_MINIATURE") or Path(__file__).parent).resolve()
    raw = json.loads((folder / "world.json").read_text(encoding="utf-8"))
    of_kind: dict[str, list[Trained]] = {"content": [], "style": []}
    for name, told in raw["loras"].items():
        of_kind[told["kind"]].append(_trained(name, told))
    shown = raw["shown"]
    return Manifest(
        folder=folder,
        checkpoint=Path(raw["checkpoint"]).name,
        judge=folder / raw["judge"],
        size=raw["size"],
        designs=raw["designs"],
        other_styles=raw["other_styles"],
        known=[Asked(*asked, design=False) for asked in raw["known"]],
        unseen=[(words, subject) for words, subject in raw["unseen"]],
        untold={(subject, style) for subject, style in raw["untold"]},
        quick=[(subject, style) for subject, style in raw["quick"]],
        blocks={concept: tuple(names) for concept, names in raw["blocks"].items()},
        shown=Shown(**{**shown, "pair": tuple(shown["pair"]), "whole": tuple(shown["whole"])}),
        subjects=of_kind["content"],
        styles=of_kind["style"],
    )


def _trained(name: str, told: dict[str, Any]) -> Trained:
    # The base directory copies every folder of pictures into the server's input folder.
    picture = Path(told["pictures"][0]).relative_to("pictures").as_posix()
    prompts = told["picture_prompts"]
    learned = Learned(Path(told["file"]).name, picture, prompts[0])
    said = (told[key] for key in ("kind", "identifier", "words", "of_class", "shows"))
    return Trained(name, *said, learned, told["pictures"], prompts)


def write_manifest(path: Path, about: dict[str, Any], entries: dict[str, dict[str, Any]]) -> None:
    """Writes `world.json` whole or not at all. about: what `Manifest` holds besides the LoRAs, and anything more."""
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps({**about, "loras": entries}, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
