"""What a training node shows while it runs: a bar, the loss so far, and the newest sample."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

from PIL import Image

from ....ziplora_core import training
from ..progress.bar import Steps
from ..progress.plots import CONTENT, GROUND, SECONDS_BETWEEN_PREVIEWS, SIZE, plotted


class TrainingProgress:
    """Moves the node's bar and shows the loss so far, or the newest sample beside it. turn: as of a `Run`."""

    def __init__(self, first: int, steps: int, turn: tuple[int, int] = (0, 1)):
        self._bar = Steps(turn[1] * steps, turn[0] * steps + first)
        self._first = first
        self._losses: list[float] = []
        self._last = 0.0
        self.sample: Image.Image | None = None

    def step(self, step: training.Step) -> None:
        self._losses.append(step.loss)
        now = time.monotonic()
        preview = None
        if step.index == step.steps or now - self._last >= SECONDS_BETWEEN_PREVIEWS:
            self._last, preview = now, ("JPEG", self._picture(step), SIZE[0] + SIZE[1])
        self._bar.advance(preview=preview)

    def _picture(self, step: training.Step) -> Image.Image:
        losses = _smooth(self._losses)
        words = {12: (f"step {step.index}/{step.steps}", "white"), 122: (f"loss {losses[-1]:.4f}", CONTENT)}
        plot = plotted({CONTENT: losses}, step.steps - self._first, max(losses), words)
        if self.sample is None:
            return plot
        sample = self.sample.resize((max(1, plot.height * self.sample.width // self.sample.height), plot.height))
        both = Image.new("RGB", (plot.width + sample.width, plot.height), GROUND)
        both.paste(plot)
        both.paste(sample, (plot.width, 0))
        return both


def _smooth(values: Sequence[float], over: int = 25) -> list[float]:
    """Running mean over the last so many."""
    sums = list(itertools.accumulate(values, initial=0.0))
    return [(sums[i] - sums[max(0, i - over)]) / min(i, over) for i in range(1, len(sums))]
