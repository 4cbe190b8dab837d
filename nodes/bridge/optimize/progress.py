"""What ZipLoRA Optimize shows while it runs: one bar over all of its parts, and what is gained so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from PIL import Image
from torch import Tensor

from ....ziplora_core import layerwise, prompts, retention
from ....ziplora_core.branch import Branch
from ....ziplora_core.shares import SolvedLayer
from ....ziplora_core.solver import Batch, Predictor, Settings, Step
from ..progress.bar import Bar
from ..progress.plots import SECONDS_BETWEEN_PREVIEWS, layer_picture, loss_picture

_LAYERS, _STEPS = "looking at the layers", "gradient steps"  # parts of the bar, as log and node call them
_MEASURING, _PROMPTS = "measuring what is kept", "measuring the prompts"
_BACKWARD = 2  # rows of a forward pass that a row's backward pass takes as long as, about
_SOLVING = 4.0  # the same of solving all layers


def finish(words: str, picture: Image.Image | None) -> None:
    """What stays on a node that has nothing to do."""
    Bar({_PROMPTS: 1.0}).finish(words, picture)


class Progress:
    """One bar over a whole zip: drawing references, layers, steps, measuring; and, a few times a second, a picture.

    Counted in rows through the network: what a part costs, whatever the device. drawn: the concepts whose references
    are drawn. count: references of each. batch_size, steps: of the gradient part.
    """

    def __init__(self, settings: Settings, concepts: int, drawn: Sequence[str], drawing: int):
        self._settings, self._concepts = settings, float(concepts)
        self._drawing = {f"drawing {concept} references": float(drawing) for concept in drawn}
        self._bar = Bar({**self._drawing, **self._work()})
        self._part, self._done = "", 0.0
        self._history: list[Step] = []
        self._solved: list[SolvedLayer] = []
        self._last = 0.0

    def _work(self) -> dict[str, float]:
        """Rows of everything that comes after drawing."""
        settings, relative = self._settings, self._settings.objective.relative
        steps = settings.gradient_steps
        concepts = self._concepts
        self._passes = concepts * layerwise.DRAWS
        self._step = settings.batch_size * concepts * (2 + _BACKWARD)
        self._before_steps = concepts * 2 * retention.DRAWS if relative and steps else 0.0
        parts = {}
        if settings.solver != "gradient":
            parts[_LAYERS] = self._passes + _SOLVING
        if steps:
            parts[_STEPS] = self._before_steps + steps * self._step
        return {**parts, _MEASURING: concepts * 3 * retention.DRAWS, _PROMPTS: concepts * 4 * prompts.DRAWS}

    @property
    def rows(self) -> float:
        """Through the network, all in all."""
        return sum(self._drawing.values()) + sum(self._work().values())

    def drawing(self, concept: str, share: float, preview: Image.Image | None) -> None:
        """A concept's references are drawn by so much, 0 to 1."""
        part = f"drawing {concept} references"
        self._bar.at(part, share * self._drawing[part], part, preview if self._due(False) else None)

    def start(self) -> None:
        """The references are there. Called again where memory ran out and everything after them is done once more."""
        self._bar.plan(self._work())
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
        if not last and now - self._last < SECONDS_BETWEEN_PREVIEWS:
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
