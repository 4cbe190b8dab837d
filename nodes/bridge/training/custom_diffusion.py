"""Train Custom Diffusion: from pictures of concepts to a patch of the layers that read the prompt, and their words."""

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
from ....ziplora_core.trained_embedding import TrainedEmbedding
from ....ziplora_core.trained_weights import Settings, TrainedWeights
from ..disk import paths
from ..lora import keys
from ..network import checks
from ..network.text_gradient import WordEncoder
from . import loading
from .concept import CLASS_COUNT, class_latents
from .denoiser import Denoiser, WordDenoiser, picture
from .embedding import check_name, check_word, in_prompts, name_in_prompts
from .layers import prompt_readers
from .lora_file import File, put_each
from .pictures import Prepared, check_letters, check_pictures, check_prompt, encode, frames
from .run import Run, check_pace, loss_line


@dataclass(frozen=True)
class Concept:
    """pictures: IMAGEs (N, H, W, 3), of any sizes. prompts: each is used with every picture; `word` in them stands for
    the concept. initial: words whose vectors it starts from. class_prompt: of prior preservation; "" for none."""

    pictures: Sequence[Tensor]
    prompts: Sequence[str]
    word: str = "*"
    initial: str = "ktn"
    class_prompt: str = ""


@dataclass
class Task:
    """concepts: one, or several that are trained together. class_pictures: of the first one's class; where a concept
    has a class prompt and no pictures, the base model draws `class_count`. metadata: more of the file's own."""

    concepts: Sequence[Concept]
    settings: Settings
    prefix: str = "loras/custom"
    resolution: int = 1024
    class_pictures: Sequence[Tensor] = ()
    class_count: int = 32
    sample_every: int = 0
    save_every: int = 0
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass
class Trained:
    """lora_model: for the host's LORA_MODEL socket. embeddings: as prompts name them. file: below the output folder."""

    lora_model: dict[str, Tensor]
    embeddings: list[str]
    loss_map: dict[str, list[float]]
    report: str
    file: str


def check(task: Task) -> None:
    """What can be refused before anything is loaded. Raises ValueError."""
    check_pace(task)
    CLASS_COUNT.check("class_count", task.class_count)
    for start, concept in zip(("", "second_"), task.concepts, strict=False):
        check_pictures(f"{start}images", concept.pictures)
        check_prompt(f"{start}prompt", "".join(concept.prompts))
        check_word(concept.word, concept.initial, f"{start}initial_word")
        check_letters("class_prompt", concept.class_prompt)
    check_name(os.path.basename(task.prefix))
    if task.class_pictures:
        check_pictures("class_images", task.class_pictures)
        check_prompt("class_prompt", task.concepts[0].class_prompt)


@dataclass
class _Words:
    """Of each concept its first vectors, and of each prompt by number: whose, and its tokens."""

    starts: list[dict[str, Tensor]]
    tokens: list[tuple[int, dict]]


def _prepare(model, clip, vae, encoder: WordEncoder, task: Task) -> tuple[Prepared, _Words]:
    called = ["initial_word", *["second_initial_word"] * len(task.concepts[1:])]
    starts = [encoder.start(of.initial, 1, name) for of, name in zip(task.concepts, called, strict=True)]
    words = _Words(starts, [])
    for index, concept in enumerate(task.concepts):
        words.tokens += [(index, encoder.tokens(text, concept.word, 1)) for text in concept.prompts]
    data = Prepared()
    with torch.no_grad():
        data.prompts = [encoder.encode(tokens, words.starts[index], load=True) for index, tokens in words.tokens]
    sets, priors = [], []
    for index, concept in enumerate(task.concepts):
        latents = [encode(model, vae, frame, task.resolution) for frame in frames(concept.pictures)]
        own = [number for number, (whose, _) in enumerate(words.tokens) if whose == index]
        sets.append([training.Example(one, number) for one in latents for number in own])
        if concept.class_prompt.strip():
            number = data.prompt(clip, concept.class_prompt)
            given = task.class_pictures if index == 0 else ()
            prompt, seed = data.prompts[number], task.settings.seed + index
            drawn = class_latents(model, vae, given, prompt, task.class_count, task.resolution, seed)
            priors += [training.Example(one, number) for one in drawn]
    data.pictures = training.Pictures(sets, priors)
    return data, words


def patch_tensors(model, updates: dict[str, Tensor], dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """As the host's LoRA loaders take whole updates. Raises ValueError where a number does not fit into the dtype."""
    names, tensors = keys.file_names(model.model), {}
    for name, update in updates.items():
        rounded = update.to(dtype)
        if not bool(torch.isfinite(rounded).all()):
            raise ValueError(f"the update of layer '{name}' does not fit into {dtype}; lower learning_rate")
        tensors[f"{names.kohya(name)}.diff"] = rounded
    return tensors


@paths.names_given_back()
def train(model, clip, vae, task: Task) -> Trained:
    """Keys and values of cross-attention in full, and one vector for each concept in every text encoder.

    model: ModelPatcher, and clip: both unchanged. Every check comes before anything is loaded. What is trained so far
    is in the files whenever the run ends, also by an interrupt or an error. Raises ValueError or FloatingPointError,
    OSError where the disk takes no file of a word, and the host's own exception where memory runs out twice; a patch
    that the disk takes not is returned all the same.
    """
    check(task)
    checks.check_model(model)
    shapes, encoder, settings = prompt_readers(model.model), WordEncoder(clip), task.settings
    about = {**task.metadata, "ziplora_settings": repr(settings)}
    patch = File(model, task.prefix, about)
    embeddings = [
        File(model, os.path.basename(task.prefix), about, folder_paths.get_folder_paths("embeddings")[0])
        for _ in task.concepts
    ]
    data, words = _prepare(model, clip, vae, encoder, task)
    training_run, began = Run(0), time.monotonic()
    said: dict[str, Callable[[], list]] = {}

    def work(denoiser: Denoiser, pictures: training.Pictures, device: torch.device) -> None:
        own = [TrainedEmbedding(start, device) for start in words.starts]
        trained = TrainedWeights(shapes, own, settings.batch_size, device)
        for number, (index, tokens) in enumerate(words.tokens):
            said[str(number)] = partial(encoder.encode, tokens, own[index].rows)

        def write(steps: int) -> str:
            first, tensors = task.concepts[0], patch_tensors(model, trained.learned())

            def put_patch() -> None:
                said_so = in_prompts(first.prompts[0], first.word, embeddings[0].name)
                patch.put(tensors, steps, {"ziplora_prompt": said_so})

            put_words = [
                partial(file.put, word.learned(), steps, {"ziplora_prompt": concept.prompts[0]})
                for file, word, concept in zip(embeddings, own, task.concepts, strict=True)
            ]
            failure = put_each([*put_words, put_patch])  # words first, which may get other names
            if failure is not None:
                raise failure
            return patch.said()

        def sample() -> Image.Image | None:
            return picture(model, denoiser, data, trained, settings.seed)

        with encoder.injected():
            training_run.follow(task, trained, denoiser, pictures, write, sample)

    make = partial(WordDenoiser, said=said)
    planned, _ = loading.with_denoiser(
        model, data, shapes, settings, work, make=make, beside=[encoder.patcher], is_whole=True
    )
    word_lines = [line for file in embeddings for line in file.beside(settings.steps, training_run.unwritten)]
    names = [name_in_prompts(file.name) for file in embeddings]
    history = training_run.history
    report = [
        patch.line(settings.steps, training_run.unwritten),
        *word_lines,
        f"in prompts: {', '.join(names)}",
        f"{len(shapes)} layers (cross-attention keys and values), "
        f"{sum(out * columns for out, columns in shapes.values()):,} numbers",
        f"steps: {history[0].index} to {history[-1].index} at rate {settings.learning_rate:g} × batch "
        f"{settings.batch_size}, seed {settings.seed}",
        f"class pictures: {len(data.pictures.priors)}, weight {settings.prior_weight:g}",
        loss_line(history),
        f"time: {time.monotonic() - began:.1f} s",
        planned.line(),
    ]
    return Trained(patch.tensors, names, training_run.loss_map(), "  \n".join(report), patch.written)
