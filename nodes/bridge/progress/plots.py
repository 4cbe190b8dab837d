"""Small plots for a node that runs: losses, layers, whatever is gained so far."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from ....ziplora_core.layerwise import SolvedLayer
from ....ziplora_core.solver import Step

SIZE = (512, 288)
SECONDS_BETWEEN_PREVIEWS = 0.25
GROUND, FRAME, CONTENT, STYLE = "#1b1b1f", "#55555f", "#56b4e9", "#e69f00"  # safe for colour-blind eyes


def loss_picture(history: Sequence[Step]) -> Image.Image:
    """The two retention losses so far, on a dark ground."""
    last = history[-1]
    curves = {
        CONTENT: [s.losses.content for s in history],
        STYLE: [s.losses.style for s in history],
    }
    words = {
        12: (f"step {last.index}/{last.steps}", "white"),
        122: (f"content {last.losses.content:.3g}", CONTENT),
        252: (f"style {last.losses.style:.3g}", STYLE),
        362: (f"overlap {last.losses.overlap:.4g}", "white"),
    }
    return plotted(curves, last.steps, max(map(max, curves.values())), words)


def layer_picture(solved: Sequence[SolvedLayer]) -> Image.Image:
    """What is left of each layer's error, from none (bottom) to the direct merge's (top)."""
    last = solved[-1]
    mean = sum(layer.left for layer in solved) / len(solved)
    words = {
        12: (f"layer {last.index}/{last.layers}", "white"),
        122: (f"error left {last.left:.0%}, {mean:.0%} on the mean", CONTENT),
    }
    return plotted({CONTENT: [layer.left for layer in solved]}, last.layers, 1.0, words)


def plotted(curves: dict[str, list[float]], length: int, high: float, words: dict[int, tuple[str, str]]) -> Image.Image:
    """curves: colour -> values, of which there will be `length`. words: x -> text and its colour."""
    width, height = SIZE
    image = Image.new("RGB", SIZE, GROUND)
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = 12, 34, width - 12, height - 12
    draw.rectangle((left, top, right, bottom), outline=FRAME)
    across, up = (right - left) / max(length - 1, 1), (bottom - top) / (high or 1.0)
    for colour, values in curves.items():
        points = [(left + i * across, bottom - value * up) for i, value in enumerate(values)]
        draw.line(points if len(points) > 1 else points * 2, fill=colour, width=2)
    for x, (text, colour) in words.items():
        draw.text((x, 10), text, fill=colour)
    return image
