"""Small plots for a node that runs: losses, layers, whatever is gained so far."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw

from ....ziplora_core.shares import SolvedLayer
from ....ziplora_core.solver import Step

SIZE = (512, 288)
SECONDS_BETWEEN_PREVIEWS = 0.25
GROUND, INK, FRAME = "#1b1b1f", "#e8e8ea", "#55555f"
BOTH = "#009e73"
# Okabe and Ito's, apart for color-blind eyes, but for the one of BOTH
_COLORS = ("#56b4e9", "#e69f00", "#cc79a7", "#f0e442", "#d55e00", "#0072b2")
CONTENT, STYLE = _COLORS[:2]


def concept_colors(concepts: Iterable[str]) -> dict[str, str]:
    """A color for each concept by its place, content's and style's for the first two."""
    return {concept: _color(place) for place, concept in enumerate(concepts)}


def _color(place: int) -> str:
    if place < len(_COLORS):
        return _COLORS[place]
    parts = colorsys.hsv_to_rgb(0.38 * place % 1, 0.4, 0.95)
    return "#" + "".join(f"{round(255 * part):02x}" for part in parts)


def loss_picture(history: Sequence[Step]) -> Image.Image:
    """The concepts' retention losses so far, on a dark ground."""
    last, colors = history[-1], concept_colors(history[-1].losses.retention)
    curves = {color: [s.losses.retention[concept] for s in history] for concept, color in colors.items()}
    words = {12: (f"step {last.index}/{last.steps}", "white"), 362: (f"overlap {last.losses.overlap:.4g}", "white")}
    few, apart = len(colors) <= 2, 130 if len(colors) <= 2 else 240 // len(colors)  # more of them are told by color
    for place, (concept, color) in enumerate(colors.items()):
        name = f"{concept} " if few else ""
        words[122 + place * apart] = (f"{name}{last.losses.retention[concept]:.3g}", color)
    return plotted(curves, last.steps, max(map(max, curves.values())), words)


def layer_picture(solved: Sequence[SolvedLayer]) -> Image.Image:
    """What is left of each layer's error, from none (bottom) to the direct merge's (top)."""
    last = solved[-1]
    mean = sum(layer.relative_error for layer in solved) / len(solved)
    words = {
        12: (f"layer {last.index}/{last.layers}", "white"),
        122: (f"error left {last.relative_error:.0%}, {mean:.0%} on the mean", CONTENT),
    }
    return plotted({CONTENT: [layer.relative_error for layer in solved]}, last.layers, 1.0, words)


def plotted(curves: dict[str, list[float]], length: int, high: float, words: dict[int, tuple[str, str]]) -> Image.Image:
    """curves: color -> values, of which there will be `length`. words: x -> text and its color."""
    width, height = SIZE
    image = Image.new("RGB", SIZE, GROUND)
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = 12, 34, width - 12, height - 12
    draw.rectangle((left, top, right, bottom), outline=FRAME)
    across, up = (right - left) / max(length - 1, 1), (bottom - top) / (high or 1.0)
    for color, values in curves.items():
        points = [(left + i * across, bottom - value * up) for i, value in enumerate(values)]
        draw.line(points if len(points) > 1 else points * 2, fill=color, width=2)
    for x, (text, color) in words.items():
        draw.text((x, 10), text, fill=color)
    return image
