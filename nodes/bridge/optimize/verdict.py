"""What came of a zip, in a few lines: the last thing that the node shows, with the references that were drawn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ....ziplora_core.prompts import PromptEffect
from ..progress.plots import GROUND, concept_colors
from .outcome import Outcome

_WIDTH, _LINE, _MARGIN, _GAP = 512, 28, 10, 6
_TEXT = "white"


def kept(concept: str, before: float, after: float) -> str:
    """What is left of the direct merge's loss, where both are numbers."""
    if not (math.isfinite(before) and math.isfinite(after)):
        return f"{concept}: the loss of the merge is not finite"
    if before <= 0:
        return f"{concept}: the direct merge loses nothing"
    return f"{concept}: {after / before:.0%} of the direct merge's loss is left"


def prompt_warnings(effects: Mapping[str, PromptEffect]) -> list[str]:
    """A line for each prompt that does not seem to wake its LoRA."""
    if effects and all(effect.swapped for effect in effects.values()):
        return ["The two prompts seem to be swapped: each wakes the other LoRA."]
    return [f"The {c} prompt does not seem to wake its LoRA." for c, effect in effects.items() if not effect.fires]


def lines(outcome: Outcome) -> list[str]:
    """The verdict, a sentence each."""
    found = []
    if outcome.retention:
        before, after = outcome.retention
        found = [kept(concept, before[concept], after[concept]) for concept in before]
    return found + prompt_warnings(outcome.prompts)


def picture(
    said: Sequence[str], curves: Image.Image | None, drawn: Mapping[str, Tensor], concepts: Iterable[str] = ()
) -> Image.Image:
    """The lines below the references that were drawn, or below the losses where a user brought all of them.

    drawn: pictures (N, H, W, 3) in 0..1 of each concept whose references were drawn, as a row each. concepts: all
    that there are, in their order, where others have none.
    """
    colors = concept_colors(dict.fromkeys([*concepts, *drawn]))
    rows = [_row(concept, colors[concept], pictures) for concept, pictures in drawn.items()] or (
        [curves] if curves else []
    )
    width = _WIDTH if drawn or not rows else rows[0].width
    height = sum(row.height for row in rows) + _LINE * len(said) + 2 * _MARGIN
    whole = Image.new("RGB", (width, height), GROUND)
    top = 0
    for row in rows:
        whole.paste(row, (0, top))
        top += row.height
    draw, font = ImageDraw.Draw(whole), _font()
    for number, line in enumerate(said):
        draw.text((_MARGIN, top + _MARGIN + number * _LINE), line, fill=_TEXT, font=font)
    return whole


def _row(concept: str, color: str, pictures: Tensor) -> Image.Image:
    """Pictures beside each other, as wide as the whole, below a heading."""
    columns = min(len(pictures), 4)
    lines_of_pictures = math.ceil(len(pictures) / columns)
    side = (_WIDTH - 2 * _MARGIN - (columns - 1) * _GAP) // columns
    side = min(side, _WIDTH // 3)
    tall = max(1, round(side * pictures.shape[1] / pictures.shape[2]))
    row = Image.new("RGB", (_WIDTH, _MARGIN + _LINE + lines_of_pictures * (tall + _GAP)), GROUND)
    heading = f"{concept} references, drawn by its LoRA"
    ImageDraw.Draw(row).text((_MARGIN, _MARGIN), heading, fill=color, font=_font())
    for number, shown in enumerate(pictures):
        pixels = Image.fromarray((shown.float().clamp(0, 1) * 255).round().cpu().numpy().astype(np.uint8))
        left = _MARGIN + number % columns * (side + _GAP)
        row.paste(pixels.resize((side, tall)), (left, _MARGIN + _LINE + number // columns * (tall + _GAP)))
    return row


def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's own, in a size that can be read on a node; small where this Pillow has one size only."""
    try:
        return ImageFont.load_default(20)
    except (TypeError, ImportError):
        return ImageFont.load_default()
