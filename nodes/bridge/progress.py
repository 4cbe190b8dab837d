"""Progress in the graph: a bar, and the loss drawn live on the node."""

from __future__ import annotations

import time

import comfy.utils
from PIL import Image, ImageDraw

from ...ziplora_core.solver import Step

_SIZE = (512, 288)
_SECONDS_BETWEEN_PREVIEWS = 0.25
_GROUND, _FRAME, _CONTENT, _STYLE = "#1b1b1f", "#55555f", "#56b4e9", "#e69f00"  # safe for colour-blind eyes


def loss_picture(history: list[Step]) -> Image.Image:
    """The two retention losses so far, on a dark ground."""
    width, height = _SIZE
    image = Image.new("RGB", _SIZE, _GROUND)
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = 12, 34, width - 12, height - 12
    draw.rectangle((left, top, right, bottom), outline=_FRAME)
    steps = max(history[-1].steps - 1, 1)
    high = max(max(s.losses.content, s.losses.style) for s in history) or 1.0
    for concept, colour in (("content", _CONTENT), ("style", _STYLE)):
        points = [
            (
                left + (s.index - 1) / steps * (right - left),
                bottom - getattr(s.losses, concept) / high * (bottom - top),
            )
            for s in history
        ]
        if len(points) == 1:
            points *= 2
        draw.line(points, fill=colour, width=2)
    last = history[-1]
    draw.text((left, 10), f"step {last.index}/{last.steps}", fill="white")
    draw.text((left + 110, 10), f"content {last.losses.content:.3g}", fill=_CONTENT)
    draw.text((left + 240, 10), f"style {last.losses.style:.3g}", fill=_STYLE)
    draw.text((left + 350, 10), f"overlap {last.losses.overlap:.4g}", fill="white")
    return image


class Progress:
    """Call it with each Step; moves the node's bar and, a few times a second, redraws the losses.

    steps: how many follow the layers; 0 where the solver takes none.
    """

    def __init__(self, steps: int):
        self._bar = comfy.utils.ProgressBar(steps)
        self._steps = steps
        self._history: list[Step] = []
        self._last = 0.0
        self._layers = 0

    def __call__(self, step: Step) -> None:
        self._history.append(step)
        preview = None
        now = time.monotonic()
        if step.index == step.steps or now - self._last > _SECONDS_BETWEEN_PREVIEWS:
            preview = ("JPEG", loss_picture(self._history), max(_SIZE))
            self._last = now
        self._bar.update_absolute(self._layers + step.index, self._layers + step.steps, preview)

    def layer(self, done: int, total: int) -> None:
        """A layer was solved in closed form; the steps, where there are any, follow on the same bar."""
        self._layers = total
        self._bar.update_absolute(done, total + self._steps)
