"""The bar of a node that runs: filled once over all parts of its work, with the seconds that are left."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

import comfy.model_management
import comfy.utils
from comfy_execution.utils import get_executing_context
from PIL import Image

WHOLE = 1000  # the bar's maximum, however much there is to do
_SECONDS_BETWEEN_TEXTS = 0.5
_SECONDS_BETWEEN_LOG_LINES = 15.0
_SECONDS_TO_JUDGE_BY = 1.0  # before nothing is said of the time that is left


def tell(text: str) -> None:
    """Show text on the node that runs, to the one who queued it, where the host and its frontend can."""
    server: Any = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    context, send = get_executing_context(), getattr(server, "send_progress_text", None)
    if send is not None and context is not None and server.client_id is not None:
        send(text, context.node_id, server.client_id)


def seconds(left: float) -> str:
    """A length of time as one says it: "40 s", "3 min"."""
    return f"{max(1, round(left))} s" if left < 100 else f"{round(left / 60)} min"


class Bar:
    """Never falls, has one maximum, and reaches it at `finish` only.

    parts: what is to be done, in order, and how much each is, in any one unit. Every call looks whether the user has
    interrupted, and raises the host's exception then: newer hosts send, and look, only a few times a second.
    """

    def __init__(self, parts: Mapping[str, float]):
        self._bar = comfy.utils.ProgressBar(WHOLE)
        self._value, self._share, self._base = 0, 0.0, 0.0
        self._part = ""
        self._told = self._logged = float("-inf")
        self._began = time.monotonic()
        self._sent = False
        self.plan(parts)

    def plan(self, parts: Mapping[str, float]) -> None:
        """What is to be done from here on: divides what is left of the bar, as where a run starts once more."""
        self._parts, self._base = dict(parts), self._share

    def at(
        self, part: str, done: float, words: str, preview: Image.Image | None = None, tell_now: bool = False
    ) -> None:
        """A part has come so far (in the unit of `parts`); those before it count as done.

        words: what is being done, for log and node. tell_now: say them even where others were said just now.
        """
        comfy.model_management.throw_exception_if_processing_interrupted()
        names = list(self._parts)
        before = sum(self._parts[name] for name in names[: names.index(part)])
        within = min(done, self._parts[part])
        share = self._base + (1 - self._base) * (before + within) / max(sum(self._parts.values()), 1e-9)
        self._share = max(self._share, share)
        self._say(part, words, tell_now)
        value = min(int(self._share * WHOLE), WHOLE - 1)
        if value > self._value or preview is not None or not self._sent:
            self._send(value, preview)

    def finish(self, words: str, preview: Image.Image | None = None) -> None:
        """All is done: the last picture and text on the node."""
        self._share = 1.0
        tell(words)
        self._send(WHOLE, preview)

    def _send(self, value: int, preview: Image.Image | None) -> None:
        self._value, self._sent = max(self._value, value), True
        shown = ("JPEG", preview, max(preview.size)) if preview is not None else None
        self._bar.update_absolute(self._value, WHOLE, shown)

    def _say(self, part: str, words: str, tell_now: bool) -> None:
        now = time.monotonic()
        text = f"{words}; {self._share:.0%}{self._left(now)}"
        if tell_now or part != self._part or now - self._told >= _SECONDS_BETWEEN_TEXTS:
            self._told = now
            tell(text)
        if part != self._part or now - self._logged >= _SECONDS_BETWEEN_LOG_LINES:
            self._logged = now
            logging.info("ZipLoRA: %s.", text)
        self._part = part

    def _left(self, now: float) -> str:
        gone = now - self._began
        if gone < _SECONDS_TO_JUDGE_BY or not self._share:
            return ""
        return f", about {seconds(gone * (1 - self._share) / self._share)} left"


class Steps:
    """The host's bar over equal steps. Looks at each whether the user has interrupted, as `Bar` does.

    total: of all steps; done: of those that an earlier run has made.
    """

    def __init__(self, total: int, done: int = 0):
        self._bar, self._done = comfy.utils.ProgressBar(total), done

    def advance(self, steps: int = 1, preview: tuple[str, Image.Image, int] | None = None) -> None:
        """preview: as the host's bar takes it."""
        self._done += steps
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._bar.update_absolute(self._done, preview=preview)
