"""From pictures and prompts to LoRAs: check, encode, load, train, save, report."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Collection, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import comfy.samplers
import comfy.utils
import folder_paths
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from PIL import Image
from torch import Tensor

from ...ziplora_core import export, trained_lora, training
from ...ziplora_core.checks import in_range, one_of
from ...ziplora_core.direct import B_LORA_BLOCKS, Blocks
from ...ziplora_core.files import read_metadata
from ...ziplora_core.pair import Factors
from ...ziplora_core.writing import write_tensors
from . import fitting, keys, loras, paths, plan, predictor, references
from .bare import bare
from .frozen import Injection, blocks
from .prompts import zeros
from .runs import Run

T = TypeVar("T")
_ATTENTION = re.compile(r"\.(?:attn\d?|attention|self_attn|cross_attn|img_attn|txt_attn)\.")
LAYERS = ("attention", "all linear", "B-LoRA", "B-LoRA content block", "B-LoRA style block")
_EVERY, _MULTIPLE = 8, 64  # pixels of a latent, and what sides of buckets are multiples of
_SAMPLE_STEPS = 20
_AT_ONCE = 4  # class pictures, in one batch


def trained_layers(model, which: str, b_lora: Blocks = B_LORA_BLOCKS) -> dict[str, tuple[int, int]]:
    """Layer (`diffusion_model.….weight`) -> (out, in) of the linear layers to train.

    model: the host's BaseModel. which: one of LAYERS. b_lora: the blocks that B-LoRA means. Raises ValueError where
    this model has none of them.
    """
    one_of("layers", which, LAYERS)
    bare(model)
    inside = {id(part) for block in blocks(model) for part in block.modules()}
    found = {}
    for path, module in model.named_modules():
        if not path.startswith("diffusion_model.") or not hasattr(module, "in_features"):
            continue
        if which == "all linear" and id(module) not in inside:
            continue
        if which != "all linear" and not _ATTENTION.search(f".{path}."):
            continue
        if which.startswith("B-LoRA") and not _in_b_lora(path, which, b_lora):
            continue
        found[f"{path}.weight"] = (module.out_features, module.in_features)
    if not found or (which.startswith("B-LoRA") and not isinstance(model.diffusion_model, UNetModel)):
        raise ValueError(
            f"this model ({type(model.model_config).__name__}) has no layers for '{which}'; choose "
            + {"attention": "'all linear'", "all linear": "another model"}.get(
                which, "'attention': B-LoRA's blocks are SDXL's"
            )
        )
    return found


def _in_b_lora(path: str, which: str, b_lora: Blocks) -> bool:
    wanted = [block for concept in b_lora if which == "B-LoRA" or concept in which for block in b_lora[concept]]
    return any(path.startswith(f"diffusion_model.{block}") for block in wanted)


@dataclass(frozen=True)
class Shown:
    """What a concept is learned from. pictures: IMAGEs (N, H, W, 3), of any sizes. prompts: one for all of them, or one
    for each picture, in order."""

    pictures: Sequence[Tensor]
    prompts: Sequence[str]

    @property
    def frames(self) -> list[Tensor]:
        return [frame[None] for batch in self.pictures for frame in batch]


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


@dataclass
class Prepared:
    """Everything but the network: prompts by number, and pictures that name them."""

    prompts: list[list] = field(default_factory=list)
    pictures: training.Pictures = field(default_factory=lambda: training.Pictures([]))

    def prompt(self, clip, text: str) -> int:
        self.prompts.append(clip.encode_from_tokens_scheduled(clip.tokenize(text)))
        return len(self.prompts) - 1

    @property
    def largest(self) -> Tensor:
        every = [e.latents for examples in (*self.pictures.sets, self.pictures.priors) for e in examples]
        return max(every, key=Tensor.numel)


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


def check_prompt(name: str, text: str) -> None:
    if not text.strip():
        raise ValueError(f"{name} is empty; write what the pictures show, with a rare word for what is new in them")
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"{name} holds half a character (a lone surrogate); write it again")


def check_pictures(name: str, pictures: Sequence[Tensor]) -> None:
    if not all(isinstance(b, Tensor) and b.ndim and b.is_floating_point() and b.element_size() > 1 for b in pictures):
        raise ValueError(f"{name} is no picture; connect a node that makes or loads one")
    if not any(len(batch) for batch in pictures):
        raise ValueError(f"{name} holds no picture; connect at least one")
    for batch in pictures:
        if batch.ndim != 4 or min(batch.shape[1:3]) < _EVERY or batch.shape[-1] < 3:
            raise ValueError(
                f"{name} has shape {tuple(batch.shape)}; expected pictures of at least 8 x 8 pixels with red, green "
                "and blue: (pictures, height, width, 3)"
            )
        if not bool(torch.isfinite(batch).all()):
            raise ValueError(f"{name} holds NaN or infinite numbers; check the node that made the picture")


def bucket(width: int, height: int, resolution: int) -> tuple[int, int]:
    """(width, height) of the bucket for a picture: its aspect, about resolution² pixels, sides multiples of 64 (of 8
    below 256)."""
    multiple = _MULTIPLE if resolution >= 4 * _MULTIPLE else _EVERY
    scale = resolution / (width * height) ** 0.5
    sides = (max(multiple, round(side * scale / multiple) * multiple) for side in (width, height))
    wide, high = sides
    return wide, high


def _encode(model, vae, frame: Tensor, resolution: int) -> Tensor:
    """A picture (1, H, W, 3), scaled to its bucket and cut to it around the middle, as latents.

    Raises ValueError where they cannot be this model's.
    """
    width, height = bucket(frame.shape[2], frame.shape[1], resolution)
    pixels = comfy.utils.common_upscale(frame[..., :3].movedim(-1, 1), width, height, "lanczos", "center")
    latents: Tensor = vae.encode(pixels.movedim(1, -1))
    predictor.check_latents("what vae makes of a picture", latents, model)
    return latents


def _draw_class(model, prompt: list, task: Task) -> list[Tensor]:
    """Latents of class pictures that the base model itself draws."""
    made: list[Tensor] = []
    while len(made) < task.class_count:
        asked = references.Asked(min(_AT_ONCE, task.class_count - len(made)), task.resolution)
        drawn = references.draw_plain(model, prompt, asked, task.settings.seed + len(made))
        if drawn is None:
            raise FloatingPointError(
                "the base model draws no class pictures (its latents are not finite): load it in bf16 or fp32, or "
                "connect class_images"
            )
        made += drawn.latents.split(1)
    return made


class Denoiser(predictor.Network):
    """The core's Denoiser on a loaded network: any number of prompts."""

    def __init__(self, guider, model_options: dict, injection: Injection):
        super().__init__(guider, model_options, injection)
        self.model = self._model
        self._encoded: dict[tuple[str, torch.Size], dict[str, Any]] = {}

    def _conditioning(self, prompt: int | str, latents: Tensor) -> dict[str, Any]:
        key = (str(prompt), latents.shape[1:])
        if key not in self._encoded:
            self._encoded[key] = self.encode(str(prompt), latents)
        return {k: v.process_cond(batch_size=1, area=None) for k, v in self._encoded[key].items()}

    def kind(self, prompt: int) -> Hashable:
        context = self._guider.conds[str(prompt)][0].get("cross_attn")
        return None if context is None else tuple(context.shape)

    def conditioning(self, rows: training.Rows) -> dict[str, Any]:
        found = [self._conditioning(p, rows.latents[i : i + 1]) for i, p in enumerate(rows.prompts)]
        return comfy.samplers.cond_cat(found)

    def __call__(self, rows: training.Rows, branch: training.Adapted) -> tuple[Tensor, Tensor]:
        x, sigma = self.noised(rows.latents, rows.noise, rows.timesteps)
        denoised = self.denoised(x, sigma, self.conditioning(rows), branch)
        prediction, target = self.raw(x, sigma, denoised, rows.latents.to(x))
        return prediction, target

    @torch.no_grad()
    def sample(self, prompt: int, latents: Tensor, branch: training.Adapted, seed: int) -> Tensor:
        """A picture's latents, as large as these (1, C, *space): Euler, guided away from an empty prompt."""
        sampling = self._model.model_sampling
        sigmas = comfy.samplers.calculate_sigmas(sampling, references.SCHEDULER, _SAMPLE_STEPS).to(self._device)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed % 2**63)).to(self._device)
        x = sampling.noise_scaling(sigmas[0], noise, torch.zeros_like(noise), True)
        for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
            level = sigma.expand(1)
            wanted, plain = (
                self.denoised(x, level, comfy.samplers.cond_cat([self._conditioning(p, latents)]), branch)
                for p in (prompt, "empty")
            )
            x0 = plain + references.GUIDANCE * (wanted - plain)
            x = x + (x - x0) / sigma * (following - sigma)
        return x


@dataclass
class Trained:
    """lora_model: for the host's LORA_MODEL socket. file: below the output folder; "" where the disk took none."""

    lora_model: dict[str, Tensor]
    loss_map: dict[str, list[float]]
    report: str
    file: str


def prepare(model, clip, vae, task: Task) -> Prepared:
    """Latents and prompts of a task; the VAE's and, for class pictures, the base model's work."""
    made = Prepared()
    sets = []
    for shown in task.sets:
        numbers = [made.prompt(clip, text) for text in shown.prompts]
        examples = []
        for index, frame in enumerate(shown.frames):
            latents = _encode(model, vae, frame, task.resolution)
            examples.append(training.Example(latents, numbers[index % len(numbers)]))
        sets.append(examples)
    priors = []
    if task.class_prompt.strip():
        number = made.prompt(clip, task.class_prompt)
        if task.class_pictures:
            drawn = [_encode(model, vae, f[None], task.resolution) for batch in task.class_pictures for f in batch]
        else:
            drawn = _draw_class(model, made.prompts[number], task)
        priors = [training.Example(latents, number) for latents in drawn]
    made.pictures = training.Pictures(sets, priors)
    return made


def run(
    model,
    made: Prepared,
    shapes: dict[str, tuple[int, int]],
    settings: training.Settings,
    work: Callable[[Denoiser, training.Pictures, Any], T],
    loras_at_once: int = 1,
) -> tuple[plan.Plan, T]:
    """Plan memory, load the model frozen, and hand a denoiser, the pictures in its own space, and the device to `work`.

    Returns the plan that worked, and what `work` returned. Where memory runs out, once more with the least.
    loras_at_once: of the rank, which are trained together.
    """
    rows = settings.batch_size * (2 if made.pictures.priors else 1)
    room = plan.room_for(model)
    planned = plan.make_for_training(
        model, shapes, made.prompts[0], made.largest, loras_at_once * settings.rank, rows, room
    )
    prompts = {str(number): conditioning for number, conditioning in enumerate(made.prompts)}
    prompts["empty"] = zeros(made.prompts[0])

    def attempt(planned: plan.Plan) -> T:
        injection = Injection(shapes, planned.recomputed)

        def prepared(guider, patcher, model_options: dict) -> T:
            def own(examples: Sequence[training.Example]) -> list[training.Example]:
                into = guider.inner_model.process_latent_in
                return [training.Example(into(e.latents.float().clone()), e.prompt) for e in examples]

            given = made.pictures
            scored = None if given.scored is None else own([given.scored])[0]
            pictures = training.Pictures([own(part) for part in given.sets], own(given.priors), scored)
            denoiser = Denoiser(guider, model_options, injection)
            return work(denoiser, pictures, patcher.load_device)

        return predictor.with_network(model, injection, prompts, made.largest.shape[1:], planned.need, prepared)

    less = "lower resolution, batch_size or rank, or train fewer layers"
    return plan.carry_out(planned, attempt, "train", less)


def lora_tensors(model, factors: dict[str, Factors], dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """In kohya's names, with alpha = rank."""
    names = keys.file_names(model.model)
    layers = {
        names.kohya(name): export.rounded(name, export.ExportLayer(f.up * f.scale, f.down), dtype)
        for name, f in factors.items()
    }
    return export.kohya_tensors(layers)


class File:
    """One LoRA file of a run, written again and again, whole or not at all. Its name is chosen once; where another
    program has it by the first time that this is written, it is the next one.

    steps: how many the file has; it is never replaced by one with fewer. tensors: what was to be written last, also
    where the disk did not take it.
    """

    def __init__(self, model, prefix: str, about: dict[str, str]):
        self.model, self.about, self.steps = model, about, 0
        self.tensors: dict[str, Tensor] = {}
        self.path = paths.reserve(prefix, folder_paths.get_output_directory(), ".safetensors")

    @property
    def name(self) -> str:
        return os.path.relpath(self.path, folder_paths.get_output_directory())

    def lora_name(self) -> str | None:
        """As the host lists it among its LoRAs; None where the file lies in no loras folder."""
        own = os.path.realpath(self.path)
        for folder in map(os.path.realpath, folder_paths.get_folder_paths("loras")):
            if own.startswith(folder + os.sep):
                name = own[len(folder) + 1 :]
                found = folder_paths.get_full_path("loras", name)
                return name if found and os.path.realpath(found) == own else None
        return None

    def write(self, factors: dict[str, Factors], steps: int) -> None:
        """Unless a try before has left more steps there. Raises OSError, and ValueError where numbers do not fit."""
        self.tensors = lora_tensors(self.model, factors)
        if steps < self.steps:
            return
        rank = str(next(iter(factors.values())).rank)
        metadata = {
            "ss_network_module": "networks.lora",
            "ss_network_dim": rank,
            "ss_network_alpha": rank,
            "ss_steps": str(steps),
            **self.about,
        }
        self.path = str(write_tensors(self.path, self.tensors, metadata))
        self.steps = steps

    def said(self) -> str:
        return f"{self.name} ({self.steps} steps)"

    def line(self, steps: int, unwritten: str | None) -> str:
        """Of a report, after so many steps. unwritten: why a file could not be written with them."""
        if self.steps >= steps:
            return f"written: {self.name}"
        line = f"{self.name} could not be written: {unwritten}; save what was learned from this node's output"
        return f"{line} (the file has {self.steps} steps)" if self.steps else line


def steps_done(name: str) -> int:
    """Of a file that was trained here; 0 for any other, also where its trainer counts its own."""
    with suppress(ValueError, KeyError):
        metadata = read_metadata(loras.lora_path(name))
        return int(metadata["ss_steps"]) if "ziplora_settings" in metadata else 0
    return 0


def check_fits(file: str, factors: dict[str, Factors], layers: Collection[str], settings: training.Settings) -> None:
    """Raises ValueError where a run cannot go on from a file: it has other layers or another rank."""
    try:
        trained_lora.check_fits(factors, layers, settings.rank)
    except ValueError as error:
        raise ValueError(f"'{file}' {error}") from error


def steps_before(file: str, settings: training.Settings) -> int:
    """That a file has. Raises ValueError where none are left to do."""
    done = steps_done(file)
    if done >= settings.steps:
        raise ValueError(f"'{file}' has {done} steps already; expected steps above that")
    return done


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
    about = {**task.made_by, "ziplora_settings": repr(settings), "ziplora_layers": task.layers}
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

        def sample() -> Image.Image:
            return picture(model, denoiser, made, trained, settings.seed)

        training_run.follow(task, trained, denoiser, pictures, write, sample)

    planned, _ = run(model, made, shapes, settings, work)
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


def loss_line(history: Sequence[training.Step]) -> str:
    tenth = max(1, len(history) // 10)
    first, last = (sum(s.loss for s in part) / tenth for part in (history[:tenth], history[-tenth:]))
    return f"loss: {first:.4f} over the first tenth, {last:.4f} over the last"


def picture(model, denoiser: Denoiser, made: Prepared, trained: training.Trainable, seed: int) -> Image.Image | None:
    """A rough picture of the first prompt, as the LoRA draws it now."""
    example = made.pictures.sets[0][0]
    latents = denoiser.sample(example.prompt, example.latents, trained.branch(None), seed)
    shown = references.thumbnails(model, model.model.process_latent_out(latents.cpu()))
    if shown is None:
        return None
    pixels = (255 * shown[0]).round().to(torch.uint8).numpy()
    return Image.fromarray(pixels)
