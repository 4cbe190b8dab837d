"""Train Embedding: from pictures to the vectors of one word (Textual Inversion), its file and a report."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import folder_paths
import torch
from PIL import Image
from torch import Tensor

from ....ziplora_core import training
from ....ziplora_core.files import shown
from ....ziplora_core.trained_embedding import Settings, TrainedEmbedding
from ..disk import paths
from ..network import checks
from ..network.text_gradient import WordEncoder, replace_word
from . import loading
from .denoiser import Denoiser, WordDenoiser, picture
from .lora_file import File
from .pictures import Prepared, check_letters, check_pictures, check_prompt, encode, frames
from .run import Run, check_pace, loss_line

_ENDS_A_NAME = re.compile(r"[\s()\[\]<>]")  # newer hosts take square and angle brackets for weights too


@dataclass
class Task:
    """What Train Embedding asks for.

    pictures: IMAGEs (N, H, W, 3), of any sizes. prompts: each of them is used with every picture; `word` in them stands
    for the concept. initial: words whose vectors it starts from. sample_every, save_every: steps; 0 for never.
    metadata: more of the file's own.
    """

    pictures: Sequence[Tensor]
    prompts: Sequence[str]
    settings: Settings
    word: str = "*"
    initial: str = "object"
    prefix: str = "concept"
    resolution: int = 1024
    sample_every: int = 0
    save_every: int = 0
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass
class Trained:
    """embedding: as prompts name it. tensors: what the file holds. file: below the folder of embeddings."""

    embedding: str
    tensors: dict[str, Tensor]
    loss_map: dict[str, list[float]]
    report: str
    file: str


def check(task: Task) -> None:
    """What can be refused before anything is loaded. Raises ValueError."""
    check_pace(task)
    check_pictures("images", task.pictures)
    check_prompt("prompt", "".join(task.prompts))
    check_word(task.word, task.initial)
    check_name(task.prefix)


def check_name(prefix: str) -> None:
    """Raises ValueError for a prefix of embedding files that no prompt could name: the host's tokenizers would read a
    part of the name."""
    found = _ENDS_A_NAME.search(prefix)
    if found:
        raise ValueError(
            f"filename_prefix '{shown(prefix)}' holds '{shown(found[0])}', at which an embedding's name ends in "
            "prompts; write letters, digits, - and _"
        )


def check_word(word: str, initial: str, called: str = "initial_word") -> None:
    """Raises ValueError where a word is none, or there is nothing for it to start from. called: the input of that."""
    if not word.strip() or word.split() != [word]:
        raise ValueError(f"word is '{shown(word)}'; expected one word, or a sign such as *")
    check_letters("word", word)
    check_letters(called, initial)
    if not initial.strip():
        raise ValueError(f"{called} is empty; write a word for training to start from")


def prepare(
    model,
    vae,
    encoder: WordEncoder,
    pictures: Sequence[Tensor],
    resolution: int,
    start: dict[str, Tensor],
    tokens: Sequence[dict],
) -> Prepared:
    """Latents of pictures, each with every prompt, and the prompts as they are at the start."""
    data = Prepared()
    with torch.no_grad():
        data.prompts = [encoder.encode(one, start, load=True) for one in tokens]
    latents = [encode(model, vae, frame, resolution) for frame in frames(pictures)]
    examples = [training.Example(one, number) for one in latents for number in range(len(tokens))]
    data.pictures = training.Pictures([examples])
    return data


def name_in_prompts(file: str) -> str:
    """As the host reads it there. file: below the folder of embeddings."""
    return f"embedding:{os.path.splitext(file)[0]}".replace(os.sep, "/")


def in_prompts(prompt: str, word: str, file: str) -> str:
    """A caption with the embedding in the place of the word that stood for it. file: as of `name_in_prompts`."""
    return " ".join(replace_word(prompt, word, f" {name_in_prompts(file)} ").split())


@paths.names_given_back()
def train_embedding(model, clip, vae, task: Task) -> Trained:
    """The vectors of one word, in every text encoder that takes embeddings.

    model: ModelPatcher, and clip: both unchanged. Every check comes before anything is loaded. What is trained so far
    is in the file whenever the run ends, also by an interrupt or an error. Raises ValueError or FloatingPointError,
    OSError where the disk takes no file, and the host's own exception where memory runs out twice.
    """
    check(task)
    checks.check_model(model)
    settings = task.settings
    encoder = WordEncoder(clip)
    tokens = [encoder.tokens(text, task.word, settings.vectors) for text in task.prompts]
    start = encoder.start(task.initial, settings.vectors)
    folder = folder_paths.get_folder_paths("embeddings")[0]
    about = {**task.metadata, "ziplora_settings": repr(settings), "ziplora_prompt": task.prompts[0]}
    file = File(model, task.prefix, about, folder)
    data = prepare(model, vae, encoder, task.pictures, task.resolution, start, tokens)
    training_run = Run(0)
    began = time.monotonic()
    said: dict[str, Callable[[], list]] = {}

    def work(denoiser: Denoiser, pictures: training.Pictures, device: torch.device) -> None:
        trained = TrainedEmbedding(start, device)
        said.update({str(number): partial(encoder.encode, one, trained.rows) for number, one in enumerate(tokens)})

        def write(steps: int) -> str:
            file.put(trained.learned(), steps, {})
            return file.said()

        def sample() -> Image.Image | None:
            return picture(model, denoiser, data, trained, settings.seed)

        with encoder.injected():
            training_run.follow(task, trained, denoiser, pictures, write, sample)

    make = partial(WordDenoiser, said=said)
    planned, _ = loading.with_denoiser(model, data, {}, settings, work, make=make, beside=[encoder.patcher])
    if not file.steps:
        raise OSError(f"{file.name} could not be written: {training_run.unwritten}; make room in {folder}")
    embedding = name_in_prompts(file.name)
    widths = ", ".join(f"{key} {rows.shape[1]}" for key, rows in file.tensors.items())
    history = training_run.history
    report = [
        file.line(settings.steps, training_run.unwritten),
        f"in prompts: {embedding}",
        f"{len(data.pictures.sets[0]) // len(tokens)} pictures, {len(tokens)} prompts",
        f"{settings.vectors} vectors ({widths}), from '{task.initial}'",
        f"steps: {history[0].index} to {history[-1].index} at rate {settings.learning_rate:g}, batch "
        f"{settings.batch_size}, seed {settings.seed}",
        loss_line(history),
        f"time: {time.monotonic() - began:.1f} s",
        planned.line(),
    ]
    return Trained(embedding, file.tensors, training_run.loss_map(), "  \n".join(report), file.name)
