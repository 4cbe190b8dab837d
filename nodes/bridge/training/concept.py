"""Train Concept LoRA: from pictures and prompts to a LoRA, its file and a report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from ....ziplora_core import trained_lora, training
from ....ziplora_core.blocks import B_LORA_BLOCKS, Blocks
from ....ziplora_core.checks import Range
from ..disk import paths
from ..drawing import sampling
from ..lora import fitting, loras
from ..network import checks
from . import loading
from .denoiser import Denoiser, picture
from .layers import LAYERS, trained_layers
from .lora_file import File, check_fits, steps_before
from .pictures import Prepared, TrainingImages, check_pictures, check_prompt, encode, frames, prepared
from .run import Run, check_pace, loss_line

CLASS_COUNT = Range(1, 1000)  # class pictures


@dataclass
class Task:
    """What a training node asks for.

    sets: one concept, or two for joint training. class_pictures, class_prompt: for prior preservation; where there is
    a prompt and no pictures, the base model draws `class_count`. sample_every, save_every: steps; 0 for never. b_lora:
    the blocks that B-LoRA means, SDXL's unless said otherwise. metadata: more of the file's own.
    """

    sets: list[TrainingImages]
    settings: training.Settings
    prefix: str
    resolution: int = 1024
    layers: str = LAYERS[0]
    class_prompt: str = ""
    class_pictures: Sequence[Tensor] = ()
    class_count: int = 32
    sample_every: int = 0
    save_every: int = 0
    go_on_from: str | None = None
    b_lora: Blocks = field(default_factory=lambda: B_LORA_BLOCKS)
    metadata: dict[str, str] = field(default_factory=dict)


def check(task: Task) -> None:
    """What can be refused before anything is loaded. Raises ValueError."""
    check_pace(task)
    CLASS_COUNT.check("class_count", task.class_count)
    for start, images in zip(("", "second_"), task.sets, strict=False):
        check_pictures(f"{start}images", images.pictures)
        check_prompt(f"{start}prompt", "".join(images.prompts))
        if len(images.prompts) not in (1, len(images.frames)):
            raise ValueError(
                f"{start}images holds {len(images.frames)} pictures and {start}prompt {len(images.prompts)} lines; "
                "write one line for all of them, or one for each, in order"
            )
    if task.class_pictures:
        check_pictures("class_images", task.class_pictures)
        check_prompt("class_prompt", task.class_prompt)


def class_latents(
    model, vae, pictures: Sequence[Tensor], prompt: list, count: int, resolution: int, seed: int
) -> list[Tensor]:
    """Of class pictures; of `count` that the base model draws itself, where there are none."""
    latents = [encode(model, vae, frame, resolution) for frame in frames(pictures)]
    if latents:
        return latents
    drawn = sampling.draw_many(model, prompt, count, resolution, seed)
    if drawn is None:
        raise FloatingPointError(
            "the base model draws no class pictures (its latents are not finite): load it in bf16 or fp32, or "
            "connect class_images"
        )
    return drawn


@dataclass
class Trained:
    """lora_model: for the host's LORA_MODEL socket. file: below the output folder; "" where the disk took none."""

    lora_model: dict[str, Tensor]
    loss_map: dict[str, list[float]]
    report: str
    file: str


def prepare(model, clip, vae, task: Task) -> Prepared:
    """Latents and prompts of a task; the VAE's and, for class pictures, the base model's work."""
    data = prepared(model, clip, vae, task.sets, task.resolution)
    if task.class_prompt.strip():
        number = data.prompt(clip, task.class_prompt)
        prompt, seed = data.prompts[number], task.settings.seed
        drawn = class_latents(model, vae, task.class_pictures, prompt, task.class_count, task.resolution, seed)
        priors = [training.Example(latents, number) for latents in drawn]
        data.pictures = training.Pictures(data.pictures.sets, priors)
    return data


def _prompt(task: Task) -> dict[str, str]:
    """The prompt of all pictures as metadata, by which it is offered where the file is chosen; none of several."""
    prompts = {prompt for shown in task.sets for prompt in shown.prompts}
    return {"ziplora_prompt": prompts.pop()} if len(prompts) == 1 else {}


@paths.names_given_back()
def train_concept(model, clip, vae, task: Task) -> Trained:
    """One LoRA from one concept's pictures, or two concepts' (joint training).

    model: ModelPatcher, unchanged. Every check comes before anything is loaded. What is trained so far is in the file
    whenever the run ends, also by an interrupt or an error; where the disk takes none, the LoRA is returned all the
    same, and the report says so. Raises ValueError (LoRAFileError for a file) or
    FloatingPointError, and the host's own exception where memory runs out twice.
    """
    check(task)
    checks.check_model(model)
    shapes = trained_layers(model.model, task.layers, task.b_lora)
    settings, first, start = task.settings, 0, None
    if task.go_on_from is not None:
        start = fitting.fit_one(loras.load(task.go_on_from, 1.0), model.model).factors
        check_fits(task.go_on_from, start, shapes, settings)
        first = steps_before(task.go_on_from, settings)
    about = {**task.metadata, **_prompt(task), "ziplora_settings": repr(settings), "ziplora_layers": task.layers}
    file = File(model, task.prefix, about)
    data = prepare(model, clip, vae, task)
    training_run = Run(first)
    began = time.monotonic()

    def work(denoiser: Denoiser, pictures: training.Pictures, device: torch.device) -> None:
        trained = trained_lora.TrainedLoRA(shapes, settings.rank, settings.seed, device)
        if start is not None:
            trained.load(start)

        def write(steps: int) -> str:
            file.write(trained.factors(), steps)
            return file.said()

        def sample() -> Image.Image | None:
            return picture(model, denoiser, data, trained, settings.seed)

        training_run.follow(task, trained, denoiser, pictures, write, sample)

    planned, _ = loading.with_denoiser(model, data, shapes, settings, work)
    seconds = time.monotonic() - began
    report = [
        file.line(settings.steps, training_run.unwritten),
        *_lines(task, data, shapes, training_run.history, seconds),
        planned.line(),
    ]
    return Trained(file.tensors, training_run.loss_map(), "  \n".join(report), file.written)


def _lines(task: Task, data: Prepared, shapes: dict, history: Sequence[training.Step], seconds: float) -> list[str]:
    settings = task.settings
    counts = " and ".join(str(len(part)) for part in data.pictures.sets)
    sizes = sorted({tuple(e.latents.shape[-2:]) for part in data.pictures.sets for e in part})
    lines = [
        f"{counts} pictures, latents of " + ", ".join(f"{width} x {height}" for height, width in sizes),
        f"{len(shapes)} layers ({task.layers}), rank {settings.rank}, "
        f"{settings.rank * sum(map(sum, shapes.values())):,} numbers",
        f"steps: {history[0].index} to {history[-1].index} at rate {settings.learning_rate:g}, batch "
        f"{settings.batch_size}, seed {settings.seed}",
    ]
    if data.pictures.priors:
        source = "connected" if task.class_pictures else "drawn by the base model"
        lines.append(f"class pictures: {len(data.pictures.priors)} {source}, weight {settings.prior_weight:g}")
    return [*lines, loss_line(history), f"time: {seconds:.1f} s"]
