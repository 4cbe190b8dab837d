"""Progress in the graph: a bar, and what is gained so far drawn live on the node."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

import comfy.utils
from PIL import Image, ImageDraw
from torch import Tensor

from ...ziplora_core import layerwise, prompts, retention, training
from ...ziplora_core.branch import Branch
from ...ziplora_core.layerwise import SolvedLayer
from ...ziplora_core.pair import LoRAPair
from ...ziplora_core.solver import Batch, Predictor, Settings, Step
from .bar import Bar

_SIZE = (512, 288)
_SECONDS_BETWEEN_PREVIEWS = 0.25
_LAYERS, _STEPS = "looking at the layers", "gradient steps"  # parts of the bar, as log and node call them
_MEASURING, _PROMPTS = "measuring what is kept", "measuring the prompts"
_BACKWARD = 2  # rows of a forward pass that a row's backward pass takes as long as, about
_SOLVING = 8.0  # the same of solving all layers
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
    """One bar over a whole zip: drawing references, layers, steps, measuring; and, a few times a second, a picture.

    Counted in rows through the network: what a part costs, whatever the device. drawn: the concepts whose references
    are drawn. count: references of each. batch_size, steps: of the gradient part.
    """

    def __init__(self, settings: Settings, pair: LoRAPair, drawn: Sequence[str], drawing: int):
        self._settings, self._pair = settings, pair
        self._drawing = {f"drawing {concept} references": float(drawing) for concept in drawn}
        self._bar = Bar({**self._drawing, **self._work(layerwise.MOMENTS)})
        self._part, self._done = "", 0.0
        self._history: list[Step] = []
        self._solved: list[SolvedLayer] = []
        self._last = 0.0

    def _work(self, moments: int) -> dict[str, float]:
        """Rows of everything that comes after drawing. moments: bytes for the layer-wise part."""
        settings, relative = self._settings, self._settings.objective.relative
        steps = settings.gradient_steps
        self._passes = 2.0 * layerwise.passes(self._pair, moments)
        self._step = settings.batch_size * 2.0 * (2 + _BACKWARD)
        self._before_steps = 2.0 * 2 * retention.DRAWS if relative and steps else 0.0
        parts = {}
        if settings.solver != "gradient":
            parts[_LAYERS] = self._passes + _SOLVING
        if steps:
            parts[_STEPS] = self._before_steps + steps * self._step
        return {**parts, _MEASURING: 2.0 * 3 * retention.DRAWS, _PROMPTS: 2.0 * 4 * prompts.DRAWS}

    def drawing(self, concept: str, share: float, preview: Image.Image | None) -> None:
        """A concept's references are drawn by so much, 0 to 1."""
        part = f"drawing {concept} references"
        self._bar.at(part, share * self._drawing[part], part, preview if self._due(False) else None)

    def start(self, moments: int) -> None:
        """The references are there. Called again where memory ran out and everything after them is done once more."""
        self._bar.plan(self._work(moments))
        self._history, self._solved = [], []
        self._begin(_LAYERS if self._settings.solver != "gradient" else _STEPS)

    def counted(self, predictor: Predictor) -> Predictor:
        """The same predictor, whose passes move the bar."""
        return _Counted(predictor, self.passed)

    def passed(self, rows: int) -> None:
        """So many rows have gone through the network."""
        self._done += rows
        most = self._passes if self._part == _LAYERS else float("inf")  # the rest of it are the layers themselves
        self._at(min(self._done, most), None)

    def layer(self, layer: SolvedLayer) -> None:
        """A layer was solved in closed form."""
        self._solved.append(layer)
        last = layer.index == layer.layers
        preview = layer_picture(self._solved) if self._due(last) else None
        done = min(self._done, self._passes) + _SOLVING * layer.index / layer.layers
        self._at(done, preview, f"layer {layer.index} of {layer.layers}", last)
        if last and self._settings.gradient_steps:
            self._begin(_STEPS)

    def step(self, step: Step) -> None:
        """A gradient step was taken."""
        self._history.append(step)
        self._done = self._before_steps + step.index * self._step
        preview = loss_picture(self._history) if self._due(step.index == step.steps) else None
        self._at(self._done, preview, f"step {step.index} of {step.steps}", True)

    def measuring(self) -> None:
        """What was learned is being measured now."""
        self._begin(_MEASURING)

    def prompts(self) -> None:
        """What the prompts do is being measured now."""
        self._begin(_PROMPTS)

    @property
    def picture(self) -> Image.Image | None:
        """The last picture: losses, or layers where there were no steps."""
        if self._history:
            return loss_picture(self._history)
        return layer_picture(self._solved) if self._solved else None

    def finish(self, words: str, picture: Image.Image | None) -> None:
        """Nothing is left to do. words, picture: what stays on the node."""
        self._bar.finish(words, picture)

    def _begin(self, part: str) -> None:
        self._part, self._done = part, 0.0
        self._at(0.0, None)

    def _at(self, done: float, preview: Image.Image | None, words: str = "", tell_now: bool = False) -> None:
        self._bar.at(self._part, done, words or self._part, preview, tell_now)

    def _due(self, last: bool) -> bool:
        now = time.monotonic()
        if not last and now - self._last < _SECONDS_BETWEEN_PREVIEWS:
            return False
        self._last = now
        return True


class _Counted:
    """A predictor that says when a pass is over."""

    def __init__(self, predictor: Predictor, passed: Callable[[int], None]):
        self._predictor, self._passed = predictor, passed
        self.timesteps, self.joins, self.loss_scale = predictor.timesteps, predictor.joins, predictor.loss_scale

    def __call__(self, batch: Batch, branch: Branch) -> Tensor:
        predicted = self._predictor(batch, branch)
        self._passed(len(batch.latents))
        return predicted

    def target(self, batch: Batch) -> Tensor:
        return self._predictor.target(batch)


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
