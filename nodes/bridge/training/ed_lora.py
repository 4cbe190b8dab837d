"""Train ED-LoRA: from pictures to a LoRA of network and text encoders, and the word that goes with it (Mix-of-Show)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import folder_paths
import torch
from PIL import Image
from torch import Tensor

from ....ziplora_core import training
from ....ziplora_core.trained_ed_lora import VECTORS, Settings, TrainedEDLoRA
from ....ziplora_core.trained_embedding import TrainedEmbedding
from ....ziplora_core.trained_lora import TrainedLoRA
from ..disk import paths
from ..lora import text_encoders
from ..network import checks
from ..network.text_gradient import WordEncoder
from . import loading
from .denoiser import Denoiser, WordDenoiser, picture
from .embedding import check_name, check_word, in_prompts, name_in_prompts, prepare
from .layers import text_layers, trained_layers
from .lora_file import File, about_network, lora_tensors, named_tensors, put_each
from .pictures import check_letters, check_pictures, check_prompt
from .run import Run, check_pace, loss_line


@dataclass
class Task:
    """What Train ED-LoRA asks for.

    pictures: IMAGEs (N, H, W, 3), of any sizes. prompts: each of them is used with every picture; `word` in them stands
    for the concept. class_word: whose vector the second of the word's two starts from. rare_word: whose the first; ""
    for random numbers. sample_every, save_every: steps; 0 for never. metadata: more of the LoRA file's own.
    """

    pictures: Sequence[Tensor]
    prompts: Sequence[str]
    settings: Settings
    word: str = "*"
    class_word: str = "dog"
    rare_word: str = ""
    prefix: str = "loras/ed"
    resolution: int = 1024
    sample_every: int = 0
    save_every: int = 0
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass
class Trained:
    """lora_model: for the host's LORA_MODEL socket. embedding: as prompts name it. file: below the output folder."""

    lora_model: dict[str, Tensor]
    embedding: str
    loss_map: dict[str, list[float]]
    report: str
    file: str


def check(task: Task) -> None:
    """What can be refused before anything is loaded. Raises ValueError."""
    check_pace(task)
    check_pictures("images", task.pictures)
    check_prompt("prompt", "".join(task.prompts))
    check_word(task.word, task.class_word, "class_word")
    check_name(os.path.basename(task.prefix))
    check_letters("rare_word", task.rare_word)


def _start(encoder: WordEncoder, task: Task) -> dict[str, Tensor]:
    """V_rand and V_class in every text encoder, (2, width)."""
    second = encoder.start(task.class_word, 1, "class_word")
    rare = task.rare_word.strip()
    first = encoder.start(rare, 1, "rare_word") if rare else encoder.random(1, task.settings.seed)
    return {key: torch.cat([first[key], rows]) for key, rows in second.items()}


class _Files:
    """The LoRA and the word that goes with it, of the same steps."""

    def __init__(self, model, clip, task: Task):
        about = {**task.metadata, "ziplora_settings": repr(task.settings)}
        folder = folder_paths.get_folder_paths("embeddings")[0]
        self.lora = File(model, task.prefix, about)
        self.embedding = File(model, os.path.basename(task.prefix), about, folder)
        self._model, self._task = model, task
        self._names = text_encoders.kohya_names(clip.cond_stage_model)

    def write(self, trained: TrainedEDLoRA, steps: int) -> str:
        """Raises OSError, and ValueError where numbers do not fit."""
        task, text = self._task, trained.text.factors()
        tensors = {**lora_tensors(self._model, trained.unet.factors()), **named_tensors(text, self._names)}

        def put_lora() -> None:
            said = {"ziplora_prompt": in_prompts(task.prompts[0], task.word, self.embedding.name)}
            self.lora.put(tensors, steps, {**about_network(task.settings.rank), **said})

        word = partial(self.embedding.put, trained.word.learned(), steps, {"ziplora_prompt": task.prompts[0]})
        failure = put_each([word, put_lora])  # the word first, which may get another name
        if failure is not None:
            raise failure
        return self.lora.said()


@paths.names_given_back()
def train(model, clip, vae, task: Task) -> Trained:
    """Low-rank updates of the attention of network and text encoders, and two vectors in every text encoder.

    model: ModelPatcher, and clip: both unchanged. Every check comes before anything is loaded. What is trained so far
    is in the files whenever the run ends, also by an interrupt or an error. Raises ValueError or FloatingPointError,
    OSError where the disk takes no file of the word, and the host's own exception where memory runs out twice; a LoRA
    that the disk takes not is returned all the same.
    """
    check(task)
    checks.check_model(model)
    settings = task.settings
    shapes, texts = trained_layers(model.model, "attention"), text_layers(clip)
    encoder = WordEncoder(clip)
    tokens = [encoder.tokens(text, task.word, VECTORS) for text in task.prompts]
    start = _start(encoder, task)
    files = _Files(model, clip, task)
    data = prepare(model, vae, encoder, task.pictures, task.resolution, start, tokens)
    training_run, began = Run(0), time.monotonic()
    said: dict[str, Callable[[], list]] = {}

    def work(denoiser: Denoiser, pictures: training.Pictures, device: torch.device) -> None:
        word = TrainedEmbedding(start, device)
        unet = TrainedLoRA(shapes, settings.rank, settings.seed, device)
        text = TrainedLoRA(texts, settings.rank, settings.seed + 1, device)
        trained = TrainedEDLoRA(unet, text, word, settings)
        said.update({str(number): partial(encoder.encode, one, word.rows) for number, one in enumerate(tokens)})

        def sample() -> Image.Image | None:
            return picture(model, denoiser, data, trained, settings.seed)

        with encoder.injected(texts, text.branch()):
            training_run.follow(task, trained, denoiser, pictures, partial(files.write, trained), sample)

    make = partial(WordDenoiser, said=said)
    planned, _ = loading.with_denoiser(model, data, shapes, settings, work, make=make, beside=[encoder.patcher])
    word_line = files.embedding.beside(settings.steps, training_run.unwritten)
    embedding = name_in_prompts(files.embedding.name)
    numbers = settings.rank * sum(out + columns for every in (shapes, texts) for out, columns in every.values())
    widths = ", ".join(f"{key} {rows.shape[1]}" for key, rows in start.items())
    first = f"'{task.rare_word}'" if task.rare_word.strip() else "random numbers"
    history = training_run.history
    report = [
        files.lora.line(settings.steps, training_run.unwritten),
        *word_line,
        f"in prompts: {embedding}",
        f"{len(data.pictures.sets[0]) // len(tokens)} pictures, {len(tokens)} prompts",
        f"{len(shapes)} layers of the model and {len(texts)} of its text encoders (attention), rank {settings.rank}, "
        f"{numbers:,} numbers",
        f"{VECTORS} vectors ({widths}), from {first} and '{task.class_word}'",
        f"steps: {history[0].index} to {history[-1].index} at rates {settings.learning_rate:g} (model), "
        f"{settings.text_encoder_rate:g} (text encoders), {settings.word_rate:g} (word), batch {settings.batch_size}, "
        f"seed {settings.seed}",
        loss_line(history),
        f"time: {time.monotonic() - began:.1f} s",
        planned.line(),
    ]
    return Trained(files.lora.tensors, embedding, training_run.loss_map(), "  \n".join(report), files.lora.written)
