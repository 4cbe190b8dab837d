"""Split Concept: from pictures to two words that say them together (Inspiration Tree), each a file of its own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import folder_paths
import torch
from PIL import Image
from torch import Tensor

from ....ziplora_core import split, training
from ....ziplora_core.checks import Range
from ....ziplora_core.split import Score, Settings
from ....ziplora_core.trained_embedding import TrainedEmbedding
from ..disk import paths
from ..drawing import sampling
from ..memory import plan
from ..network import checks
from ..network.text_gradient import WordEncoder
from ..progress.bar import Steps
from ..scores import picture_features
from . import loading
from .denoiser import Denoiser, WordDenoiser, picture
from .embedding import check_name, check_word, name_in_prompts, prepare
from .lora_file import File
from .pictures import check_pictures, check_prompt, frames
from .run import Run, check_pace, loss_line, try_to_write

DRAWN = Range(2, 64)  # pictures of each word
_SIDES = ("left", "right")


@dataclass
class Task:
    """What Split Concept asks for.

    pictures: IMAGEs (N, H, W, 3), of any sizes. prompts: each is used with every picture; `word` in them stands for
    both words, side by side. initial: a word that both start from, or one for each. drawn: pictures of each word.
    clip_vision: whose features choose the seed; None to choose by the loss. metadata: more of the files' own.
    """

    pictures: Sequence[Tensor]
    prompts: Sequence[str]
    settings: Settings
    word: str = "*"
    initial: str = "object"
    prefix: str = "split"
    resolution: int = 1024
    drawn: int = 8
    clip_vision: Any = None
    sample_every: int = 0
    save_every: int = 0
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass
class Tried:
    """One seed. rows: text encoder -> (2, width), the left word's and the right's. loss: on noise that is the same for
    all. images: what each word draws, IMAGE; empty before that."""

    settings: Settings
    rows: dict[str, Tensor]
    loss: float
    run: Run
    images: list[Tensor] = field(default_factory=list)
    score: Score | None = None

    def line(self) -> str:
        said = f"seed {self.settings.seed}: loss {self.loss:.4f}"
        if self.score is None:
            return said
        of = self.score
        return f"{said}, left {of.left:.3f}, right {of.right:.3f}, between {of.between:.3f}, score {of.total:.3f}"


@dataclass
class Split:
    """embeddings: left and right, as prompts name them. images: what each draws, IMAGE (N, H, W, 3)."""

    embeddings: list[str]
    images: list[Tensor]
    loss_map: dict[str, list[float]]
    report: str
    files: list[str]


def check(task: Task) -> None:
    """What can be refused before anything is loaded. Raises ValueError."""
    check_pace(task)
    DRAWN.check("drawn_count", task.drawn)
    check_pictures("images", task.pictures)
    check_prompt("prompt", "".join(task.prompts))
    check_word(task.word, task.initial)
    check_name(task.prefix)


class _Files:
    """Both words of one seed, never of two."""

    def __init__(self, model, task: Task):
        self.folder = folder_paths.get_folder_paths("embeddings")[0]
        about = {**task.metadata, "ziplora_settings": repr(task.settings), "ziplora_prompt": task.prompts[0]}
        self.files = [File(model, f"{task.prefix}_{side}", about, self.folder) for side in _SIDES]

    def write(self, rows: dict[str, Tensor], seed: int, steps: int) -> str:
        for file, half in zip(self.files, split.halves(rows), strict=True):
            file.put(half, steps, {"ziplora_seed": str(seed)})
        return self.said()

    def said(self) -> str:
        return " and ".join(file.said() for file in self.files)

    @property
    def names(self) -> list[str]:
        return [file.name for file in self.files]


@paths.names_given_back()
def split_concept(model, clip, vae, task: Task) -> Split:
    """Two words' vectors, in every text encoder that takes embeddings, of the best of some seeds.

    model: ModelPatcher, and clip: both unchanged. Every check comes before anything is loaded. Of the seeds that are
    done the one with the least loss, or what there is of the first one, is in the files whenever the run ends, also by
    an interrupt or an error. Raises ValueError or FloatingPointError, OSError where the disk takes no file, and the
    host's own exception where memory runs out twice.
    """
    check(task)
    checks.check_model(model)
    encoder = WordEncoder(clip)
    tokens = [encoder.tokens(text, task.word, 2) for text in task.prompts]
    start = encoder.start(task.initial, 2)
    if task.clip_vision is not None:
        picture_features(task.clip_vision, frames(task.pictures)[0], Steps(1))
    files, began = _Files(model, task), time.monotonic()
    tried, planned = _try_seeds(model, vae, encoder, task, start, tokens, files)
    best = _least(tried)
    for one in tried if task.clip_vision is not None else [best]:
        one.images = _drawn(model, vae, encoder, task, one.rows)
    if task.clip_vision is not None:
        best = _most_consistent(task, tried)
    write = partial(files.write, best.rows, best.settings.seed)
    unwritten = try_to_write(write, task.settings.steps) and try_to_write(write, task.settings.steps)
    if unwritten:
        raise OSError(f"{' and '.join(files.names)} could not be written: {unwritten}; make room in {files.folder}")
    embeddings = [name_in_prompts(name) for name in files.names]
    report = [f"written: {' and '.join(files.names)}", f"in prompts: {' '.join(embeddings)}"]
    report += [f"{len(frames(task.pictures))} pictures, {len(tokens)} prompts, both words from '{task.initial}'"]
    report += [one.line() for one in tried]
    report += [*_reasons(task, best), loss_line(best.run.history)]
    report += [f"time: {time.monotonic() - began:.1f} s", planned.line()]
    return Split(embeddings, best.images, best.run.loss_map(), "  \n".join(report), files.names)


def _reasons(task: Task, best: Tried) -> list[str]:
    settings = best.settings
    way = "the largest score" if task.clip_vision is not None else "the least loss; connect clip_vision to score them"
    pace = f"{settings.steps} at rate {settings.learning_rate:g}, batch {settings.batch_size}"
    return [f"chosen: seed {settings.seed}, {way}", f"steps: {pace}, for each of {settings.seeds} seeds"]


def _try_seeds(
    model, vae, encoder: WordEncoder, task: Task, start: dict[str, Tensor], tokens: Sequence[dict], files: _Files
) -> tuple[list[Tried], plan.Plan]:
    """Each seed trained and its loss measured. Where memory runs out, those that are done are not done again."""
    data = prepare(model, vae, encoder, task.pictures, task.resolution, start, tokens)
    settings = task.settings
    tried: list[Tried] = []
    runs = [Run(0, (number, settings.seeds)) for number in range(settings.seeds)]
    said: dict[str, Callable[[], list]] = {}

    def one_seed(number: int, denoiser: Denoiser, pictures: training.Pictures, device: torch.device) -> Tried:
        trained, own = TrainedEmbedding(start, device), settings.of(number)
        said.update({str(n): partial(encoder.encode, one, trained.rows) for n, one in enumerate(tokens)})

        def write(steps: int) -> str:
            """Later seeds write nothing on the way, since the files have a whole one."""
            return files.said() if number else files.write(trained.learned(), own.seed, steps)

        def sample() -> Image.Image | None:
            return picture(model, denoiser, data, trained, own.seed)

        runs[number].follow(replace(task, settings=own), trained, denoiser, pictures, write, sample)
        loss = training.mean_loss(trained, denoiser, pictures, settings, settings.unseen)
        return Tried(own, trained.learned(), loss, runs[number])

    def work(denoiser: Denoiser, pictures: training.Pictures, device: torch.device) -> None:
        with encoder.injected():
            for number in range(len(tried), settings.seeds):
                tried.append(one_seed(number, denoiser, pictures, device))
                if number and _least(tried) is tried[-1]:
                    try_to_write(partial(files.write, tried[-1].rows, tried[-1].settings.seed), settings.steps)

    make = partial(WordDenoiser, said=said)
    planned, _ = loading.with_denoiser(model, data, {}, settings, work, make=make, beside=[encoder.patcher])
    return tried, planned


def _least(tried: Sequence[Tried]) -> Tried:
    """A loss that is no number, as where fp16 overflows on the noise that it is measured on, is larger than any."""
    return min(tried, key=lambda one: math.inf if math.isnan(one.loss) else one.loss)


def _drawn(model, vae, encoder: WordEncoder, task: Task, rows: dict[str, Tensor]) -> list[Tensor]:
    """What each word alone draws, IMAGE (N, H, W, 3): every seed's from the same noise."""
    tokens, images = encoder.tokens(task.word, task.word, 1), []
    for side, half in zip(_SIDES, split.halves(rows), strict=True):
        with torch.no_grad():
            prompt = encoder.encode(tokens, half, load=True)
        latents = sampling.draw_many(model, prompt, task.drawn, task.resolution, task.settings.seed)
        if latents is None:
            raise FloatingPointError(
                f"the {side} word draws no pictures (their latents are not finite): load the model in bf16 or fp32; "
                "the files have the seed of the least loss"
            )
        images.append(torch.cat([vae.decode(one) for one in latents]))
    return images


def _most_consistent(task: Task, tried: Sequence[Tried]) -> Tried:
    bar = Steps(len(tried) * len(_SIDES) * task.drawn)
    scores = []
    for one in tried:
        one.score = split.score(*(picture_features(task.clip_vision, images, bar) for images in one.images))
        scores.append(one.score.total)
    return tried[scores.index(max(scores))]
