"""Progress in the graph: a bar, and what is gained so far drawn live on the node."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import comfy.utils
from PIL import Image, ImageDraw

from ...ziplora_core import training
from ...ziplora_core.layerwise import SolvedLayer
from ...ziplora_core.solver import Step

_SIZE = (512, 288)
_SECONDS_BETWEEN_PREVIEWS = 0.25
_GROUND, _FRAME, _CONTENT, _STYLE = "#1b1b1f", "#55555f", "#56b4e9", "#e69f00"  # safe for colour-blind eyes


def loss_picture(history: Sequence[Step]) -> Image.Image:
    """The two retention losses so far, on a dark ground."""
    last = history[-1]
    curves = {
        _CONTENT: [s.losses.content for s in history],
        _STYLE: [s.losses.style for s in history],
    }
    words = {
        12: (f"step {last.index}/{last.steps}", "white"),
        122: (f"content {last.losses.content:.3g}", _CONTENT),
        252: (f"style {last.losses.style:.3g}", _STYLE),
        362: (f"overlap {last.losses.overlap:.4g}", "white"),
    }
    return _plot(curves, last.steps, max(map(max, curves.values())), words)


def layer_picture(solved: Sequence[SolvedLayer]) -> Image.Image:
    """What is left of each layer's error, from none (bottom) to the direct merge's (top)."""
    last = solved[-1]
    mean = sum(layer.left for layer in solved) / len(solved)
    words = {
        12: (f"layer {last.index}/{last.layers}", "white"),
        122: (f"error left {last.left:.0%}, {mean:.0%} on the mean", _CONTENT),
    }
    return _plot({_CONTENT: [layer.left for layer in solved]}, last.layers, 1.0, words)


def _plot(curves: dict[str, list[float]], length: int, high: float, words: dict[int, tuple[str, str]]) -> Image.Image:
    """curves: colour -> values, of which there will be `length`. words: x -> text and its colour."""
    width, height = _SIZE
    image = Image.new("RGB", _SIZE, _GROUND)
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = 12, 34, width - 12, height - 12
    draw.rectangle((left, top, right, bottom), outline=_FRAME)
    across, up = (right - left) / max(length - 1, 1), (bottom - top) / (high or 1.0)
    for colour, values in curves.items():
        points = [(left + i * across, bottom - value * up) for i, value in enumerate(values)]
        draw.line(points if len(points) > 1 else points * 2, fill=colour, width=2)
    for x, (text, colour) in words.items():
        draw.text((x, 10), text, fill=colour)
    return image


class Progress:
    """Moves the node's bar and, a few times a second, redraws the picture: layers first, then steps, on one bar.

    steps: how many steps will follow the layers; 0 where the solver takes none.
    """

    def __init__(self, steps: int):
        self._bar = comfy.utils.ProgressBar(steps)
        self._steps = steps
        self._history: list[Step] = []
        self._solved: list[SolvedLayer] = []
        self._last = 0.0

    def step(self, step: Step) -> None:
        """A gradient step was taken."""
        self._history.append(step)
        preview = loss_picture(self._history) if self._due(step.index == step.steps) else None
        self._move(len(self._solved) + step.index, len(self._solved) + step.steps, preview)

    def layer(self, layer: SolvedLayer) -> None:
        """A layer was solved in closed form."""
        self._solved.append(layer)
        preview = layer_picture(self._solved) if self._due(layer.index == layer.layers) else None
        self._move(layer.index, layer.layers + self._steps, preview)

    def _due(self, last: bool) -> bool:
        now = time.monotonic()
        if not last and now - self._last < _SECONDS_BETWEEN_PREVIEWS:
            return False
        self._last = now
        return True

    def _move(self, done: int, total: int, preview: Image.Image | None) -> None:
        self._bar.update_absolute(done, total, ("JPEG", preview, max(_SIZE)) if preview else None)


class TrainingProgress:
    """Moves the node's bar and shows the loss so far, or the newest sample beside it."""

    def __init__(self, first: int, steps: int):
        self._bar = comfy.utils.ProgressBar(steps)
        self._first = first
        self._losses: list[float] = []
        self._last = 0.0
        self.sample: Image.Image | None = None

    def step(self, step: training.Step) -> None:
        self._losses.append(step.loss)
        now = time.monotonic()
        preview = None
        if step.index == step.steps or now - self._last >= _SECONDS_BETWEEN_PREVIEWS:
            self._last, preview = now, ("JPEG", self._picture(step), _SIZE[0] + _SIZE[1])
        self._bar.update_absolute(step.index, step.steps, preview)

    def _picture(self, step: training.Step) -> Image.Image:
        losses = _smooth(self._losses)
        words = {12: (f"step {step.index}/{step.steps}", "white"), 122: (f"loss {losses[-1]:.4f}", _CONTENT)}
        plot = _plot({_CONTENT: losses}, step.steps - self._first, max(losses), words)
        if self.sample is None:
            return plot
        sample = self.sample.resize((max(1, plot.height * self.sample.width // self.sample.height), plot.height))
        both = Image.new("RGB", (plot.width + sample.width, plot.height), _GROUND)
        both.paste(plot)
        both.paste(sample, (plot.width, 0))
        return both


def _smooth(values: Sequence[float], over: int = 25) -> list[float]:
    """Running mean over the last so many."""
    sums = list(itertools.accumulate(values, initial=0.0))
    return [(sums[i] - sums[max(0, i - over)]) / min(i, over) for i in range(1, len(sums))]
