"""Train Concept LoRA: from pictures and prompts to a LoRA, its file and a report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from ....ziplora_core import trained_lora, training
from ....ziplora_core.checks import in_range
from ....ziplora_core.direct.blocks import B_LORA_BLOCKS, Blocks
from ..disk import paths
from ..drawing import sampling
from ..lora import fitting, loras
from . import loading
from .denoiser import Denoiser, picture
from .layers import LAYERS, trained_layers
from .lora_file import File, check_fits, steps_before
from .pictures import Prepared, Shown, check_pictures, check_prompt, encode, prepared
from .run import Run, loss_line

_AT_ONCE = 4  # class pictures, in one batch


@dataclass
class Task:
    """What a training node asks for.

    sets: one concept, or two for joint training. class_pictures, class_prompt: for prior preservation; where there is
    a prompt and no pictures, the base model draws `class_count`. sample_every, save_every: steps; 0 for never. b_lora:
    the blocks that B-LoRA means, SDXL's unless said otherwise. made_by: more metadata for the file.
    """

    sets: list[Shown]
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
    made_by: dict[str, str] = field(default_factory=dict)


def check(task: Task) -> None:
    """What can be refused before anything is loaded. Raises ValueError."""
    in_range("resolution", task.resolution, 64, 4096)
    in_range("class_count", task.class_count, 1, 1000)
    in_range("sample_every", task.sample_every, 0, 100_000)
    in_range("save_every", task.save_every, 0, 100_000)
    for start, shown in zip(("", "second_"), task.sets, strict=False):
        check_pictures(f"{start}images", shown.pictures)
        check_prompt(f"{start}prompt", "".join(shown.prompts))
        if len(shown.prompts) not in (1, len(shown.frames)):
            raise ValueError(
                f"{start}images holds {len(shown.frames)} pictures and {start}prompt {len(shown.prompts)} lines; write "
                "one line for all of them, or one for each, in order"
            )
    if task.class_pictures:
        check_pictures("class_images", task.class_pictures)
        check_prompt("class_prompt", task.class_prompt)


def _draw_class(model, prompt: list, task: Task) -> list[Tensor]:
    """Latents of class pictures that the base model itself draws."""
    made: list[Tensor] = []
    while len(made) < task.class_count:
        asked = sampling.Asked(min(_AT_ONCE, task.class_count - len(made)), task.resolution)
        drawn = sampling.draw_plain(model, prompt, asked, task.settings.seed + len(made))
        if drawn is None:
            raise FloatingPointError(
                "the base model draws no class pictures (its latents are not finite): load it in bf16 or fp32, or "
                "connect class_images"
            )
        made += drawn.latents.split(1)
    return made


@dataclass
class Trained:
    """lora_model: for the host's LORA_MODEL socket. file: below the output folder; "" where the disk took none."""

    lora_model: dict[str, Tensor]
    loss_map: dict[str, list[float]]
    report: str
    file: str


def prepare(model, clip, vae, task: Task) -> Prepared:
    """Latents and prompts of a task; the VAE's and, for class pictures, the base model's work."""
    made = prepared(model, clip, vae, task.sets, task.resolution)
    if task.class_prompt.strip():
        number = made.prompt(clip, task.class_prompt)
        if task.class_pictures:
            drawn = [encode(model, vae, f[None], task.resolution) for batch in task.class_pictures for f in batch]
        else:
            drawn = _draw_class(model, made.prompts[number], task)
        priors = [training.Example(latents, number) for latents in drawn]
        made.pictures = training.Pictures(made.pictures.sets, priors)
    return made


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
    shapes = trained_layers(model.model, task.layers, task.b_lora)
    settings, first, start = task.settings, 0, None
    if task.go_on_from is not None:
        start = fitting.fit_one(loras.load(task.go_on_from, 1.0), model.model).factors
        check_fits(task.go_on_from, start, shapes, settings)
        first = steps_before(task.go_on_from, settings)
    about = {**task.made_by, **_prompt(task), "ziplora_settings": repr(settings), "ziplora_layers": task.layers}
    file = File(model, task.prefix, about)
    made = prepare(model, clip, vae, task)
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
            return picture(model, denoiser, made, trained, settings.seed)

        training_run.follow(task, trained, denoiser, pictures, write, sample)

    planned, _ = loading.with_denoiser(model, made, shapes, settings, work)
    seconds = time.monotonic() - began
    report = [
        file.line(settings.steps, training_run.unwritten),
        *_lines(task, made, shapes, training_run.history, seconds),
        planned.line(),
    ]
    name = file.name if file.steps else ""
    return Trained(file.tensors, training_run.loss_map(), "  \n".join(report), name)


def _lines(task: Task, made: Prepared, shapes: dict, history: Sequence[training.Step], seconds: float) -> list[str]:
    settings = task.settings
    counts = " and ".join(str(len(part)) for part in made.pictures.sets)
    sizes = sorted({tuple(e.latents.shape[-2:]) for part in made.pictures.sets for e in part})
    lines = [
        f"{counts} pictures, latents of " + ", ".join(f"{width} x {height}" for height, width in sizes),
        f"{len(shapes)} layers ({task.layers}), rank {settings.rank}, "
        f"{settings.rank * sum(map(sum, shapes.values())):,} numbers",
        f"steps: {history[0].index} to {history[-1].index} at rate {settings.learning_rate:g}, batch "
        f"{settings.batch_size}, seed {settings.seed}",
    ]
    if made.pictures.priors:
        source = "connected" if task.class_pictures else "drawn by the base model"
        lines.append(f"class pictures: {len(made.pictures.priors)} {source}, weight {settings.prior_weight:g}")
    return [*lines, loss_line(history), f"time: {seconds:.1f} s"]
