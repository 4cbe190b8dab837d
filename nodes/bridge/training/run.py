"""One training run over one try or two: steps, progress, files on the way, and what is kept when it ends early."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from PIL import Image

from ....ziplora_core import training
from ....ziplora_core.checks import Range
from ....ziplora_core.standing import TrainingState
from ..memory import retry
from .pictures import RESOLUTION
from .progress import TrainingProgress

INTERVAL = Range(0, 100_000)  # steps between two samples or two files; 0 for never


def loss_line(history: Sequence[training.Step]) -> str:
    tenth = max(1, len(history) // 10)
    first, last = (sum(s.loss for s in part) / tenth for part in (history[:tenth], history[-tenth:]))
    return f"loss: {first:.4f} over the first tenth, {last:.4f} over the last"


class Paced(Protocol):
    """What a training node asks of any run. resolution: pixels. sample_every, save_every: steps; 0 for never."""

    @property
    def settings(self) -> training.Settings: ...

    @property
    def resolution(self) -> int: ...

    @property
    def sample_every(self) -> int: ...

    @property
    def save_every(self) -> int: ...


def check_pace(task: Paced) -> None:
    """Raises ValueError for a value that the API let through."""
    RESOLUTION.check("resolution", task.resolution)
    INTERVAL.check("sample_every", task.sample_every)
    INTERVAL.check("save_every", task.save_every)


class Run:
    """Where memory runs out, the next try goes on from the last step of the one before.

    first: steps that were done before the run. history: the steps of the run, over all tries. unwritten: why what was
    learned is not on disk at the end; None where it is. turn: which of how many equal runs of one node it is, from 0.
    """

    def __init__(self, first: int, turn: tuple[int, int] = (0, 1)):
        self.first, self.turn = first, turn
        self.history: list[training.Step] = []
        self.unwritten: str | None = None
        self._state: TrainingState | None = None

    @property
    def done(self) -> int:
        return self.history[-1].index if self.history else self.first

    def loss_map(self) -> dict[str, list[float]]:
        """The loss of each step, and the step's number."""
        return {"loss": [step.loss for step in self.history], "step": [float(step.index) for step in self.history]}

    def _resume(self, trained: training.Trainable, adam: torch.optim.Adam) -> None:
        """Go on from what the try before has left, or start anew where it could leave nothing."""
        state, self._state = self._state, None
        if state is None:
            self.history.clear()
        else:
            state.restore(trained, adam)
            logging.info("ZipLoRA: training goes on from step %d.", self.done)

    def _keep_state(self, trained: training.Trainable, adam: torch.optim.Adam) -> None:
        """For the next try. Where there is no memory for that either, it starts anew."""
        try:
            self._state = TrainingState.of(trained, adam)
        except (RuntimeError, MemoryError) as error:
            logging.warning("ZipLoRA: the next try starts anew: %s", error)

    def follow(
        self,
        task: Paced,
        trained: training.Trainable,
        denoiser: training.Denoiser,
        pictures: training.Pictures,
        write: Callable[[int], str],
        sample: Callable[[], Image.Image | None],
    ) -> None:
        """`training.train` to the end, with progress and samples on the node and files on the way.

        write: writes the file at so many steps and returns which file has how many; called on the way, at the end, and
        where a try ends early, if it can be done: what ended it is the error to be seen. A disk that takes no file ends
        no run: it is tried again at the next time of writing, twice at the end.
        """
        settings = task.settings
        adam = torch.optim.Adam(trained.groups(settings.learning_rate))
        self._resume(trained, adam)
        progress = TrainingProgress(self.done, settings.steps, self.turn)

        def on_step(step: training.Step) -> None:
            self.history.append(step)
            done = step.index
            if task.sample_every and done % task.sample_every == 0:
                progress.sample = sample()
            if task.save_every and done % task.save_every == 0 and done < settings.steps:
                try_to_write(write, done)
            progress.step(step)

        try:
            training.train(trained, denoiser, pictures, settings, on_step, self.done, adam)
        except BaseException as error:
            if self.done > self.first:
                _rescue(write, self.done)
                if retry.is_out_of_memory(error):
                    self._keep_state(trained, adam)
            raise
        self.unwritten = try_to_write(write, settings.steps) and try_to_write(write, settings.steps)


def try_to_write(write: Callable[[int], str], steps: int) -> str | None:
    """Write; None, or why the disk took no file."""
    try:
        write(steps)
    except OSError as error:
        logging.warning("ZipLoRA: what was learned in %d steps could not be written: %s", steps, error)
        return str(getattr(error.__cause__, "strerror", None) or error)
    return None


def _rescue(write: Callable[[int], str], steps: int) -> None:
    try:
        logging.info("ZipLoRA: training ended after step %d; what was learned is in %s.", steps, write(steps))
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        logging.warning("ZipLoRA: the %d steps done so far could not be written: %s", steps, error)
