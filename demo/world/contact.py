"""Contact sheets of the data itself: every drawing of every set, and every technique on the designs."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

from . import atlas, scenes
from .sets import SETS
from .subjects import DESIGNS
from .techniques import TECHNIQUES

SIDE, LABEL = 40, 72  # pixels of a drawing, and of the word before a row
ROWS, BLOCKS = 32, 4


def drawings(work: Path) -> None:
    """`drawings_N.png`: a row per subject, a column per set in the order of `SETS`."""
    found = atlas.load(work / "atlas.safetensors")
    names = list(dict.fromkeys(subject for subject, _ in found.keys))
    width = LABEL + SIDE * len(SETS)
    for page, start in enumerate(range(0, len(names), ROWS * BLOCKS)):
        out = Image.new("RGB", (BLOCKS * width, ROWS * SIDE), "white")
        pen = ImageDraw.Draw(out)
        for i, subject in enumerate(names[start : start + ROWS * BLOCKS]):
            left, top = (i // ROWS) * width, (i % ROWS) * SIDE
            pen.text((left + 2, top + SIDE // 3), subject[:12], fill="black")
            for column, word in enumerate(SETS):
                if (subject, word) in found.number:
                    pixels = found.pictures[found.number[subject, word]].permute(1, 2, 0).numpy()
                    small = Image.fromarray(pixels).resize((SIDE - 2, SIDE - 2), Image.Resampling.LANCZOS)
                    out.paste(small, (left + LABEL + column * SIDE, top), small)
        out.save(work / f"drawings_{page + 1}.png")


def techniques(work: Path) -> None:
    """`techniques.png`: a row per technique, a column per design."""
    found = atlas.load(work / "atlas.safetensors")
    rows = [scenes.Scene(s, word, name, "blue", size=100.0) for name in TECHNIQUES for s, word in DESIGNS.items()]
    atlas.sheet(scenes.render(found, rows), len(DESIGNS)).save(work / "techniques.png")
