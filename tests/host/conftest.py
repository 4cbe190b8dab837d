"""The miniature's concepts, for tests that want a pair and do not care which."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from graphs import Concept

from devhost.base import find_miniature


@pytest.fixture(scope="session")
def concepts() -> dict[str, list[Concept]]:
    """Every shipped LoRA, by what it is: "content" or "style". From the miniature's manifest, `world.json`."""
    folder = find_miniature().checkpoint.parent.parent
    manifest = json.loads((folder / "world.json").read_text(encoding="utf-8"))
    found: dict[str, list[Concept]] = {"content": [], "style": []}
    for entry in manifest["loras"].values():
        picture = Path(entry["pictures"][0])  # pictures/<name>/<number>.png, copied as <name>/ into the input folder
        concept = Concept(
            Path(entry["file"]).name, entry["picture_prompts"][0], f"{picture.parent.name}/{picture.name}"
        )
        found[entry["kind"]].append(concept)
    return found


@pytest.fixture(scope="session")
def content(concepts: dict[str, list[Concept]]) -> Concept:
    return concepts["content"][0]


@pytest.fixture(scope="session")
def style(concepts: dict[str, list[Concept]]) -> Concept:
    return concepts["style"][0]
