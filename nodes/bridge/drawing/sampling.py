"""Latents that a model draws from a prompt with the host's own sampler, and rough pictures of latents."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import comfy.latent_formats
import comfy.model_management
import comfy.sample
import comfy.samplers
import latent_preview
import torch
from PIL import Image
from torch import Tensor

from ....ziplora_core.checks import SEED, Range, one_of
from ..memory.retry import is_out_of_memory
from ..network.empty_prompt import zeros
from ..network.session import attention_with_gradient
from . import recipes

Watch = Callable[[float, Image.Image | None], None]
COUNT, SIDE = Range(1, 64), Range(64, 8192)  # of a ReferenceRequest
_AT_ONCE = 4  # pictures of many in one batch
SIDE_OR_BEST = Range(0, SIDE.high)  # 0: what the model draws best
SAMPLERS, SCHEDULERS = tuple(comfy.samplers.KSampler.SAMPLERS), tuple(comfy.samplers.KSampler.SCHEDULERS)
DRAWING_STEPS, CFG, DRAWN = Range(1, 10_000), Range(0, 100), Range(16, 16384)  # of a Drawing: as the host's nodes


@dataclass(frozen=True)
class ReferenceRequest:
    """How many references to draw where none are connected, and their side in pixels."""

    count: int = 4
    side: int = 1024

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of range, naming the input."""
        COUNT.check("drawn_references", self.count)
        SIDE.check("drawn_size", self.side)


@dataclass(frozen=True)
class GeneratedReferences:
    """What was drawn for one concept: latents as a LATENT's samples, and the seed and recipe that draw them again.
    guidance: in the prompt, where it holds such a number and the model takes it."""

    latents: Tensor
    seed: int
    recipe: recipes.Recipe
    guidance: float | None = None

    def line(self, concept: str) -> str:
        count, height, width = len(self.latents), *self.latents.shape[-2:]
        guided = "" if self.guidance is None else f", guidance {self.guidance:g} in the prompt"
        return (
            f"{concept} references: {count} drawn with its LoRA alone, latents of {width} x {height}, "
            f"seed {self.seed}, {self.recipe.line()}{guided}"
        )


_PIXELS = {"Flux2": 16, "Wan22": 16, "HunyuanImage21": 32, "LTXV": 32}  # where an older host does not say


def _spacing(form) -> int:
    """How many pixels wide one number of a latent is."""
    return getattr(form, "spacial_downscale_ratio", None) or _PIXELS.get(type(form).__name__, 8)


def draw_plain(
    model, conditioning: list, request: ReferenceRequest, seed: int, watch: Watch | None = None, most_steps: int = 0
) -> GeneratedReferences | None:
    """Latents that a model draws from a prompt; None where they are not finite. model: ModelPatcher, unchanged.

    most_steps: 0 for as many as references get.

    watch: hears after each step how much is done, 0 to 1, and sees a rough picture where the host previews; what it
    raises ends the drawing, as an interrupt does. Without it the progress shows as any sampler's.
    """
    model = model.clone()
    if model.load_device.type == "cpu":  # the host's choice there cuts attention into pieces
        options = model.model_options.setdefault("transformer_options", {})
        options["optimized_attention_override"] = attention_with_gradient
    side = request.side // _spacing(model.get_model_object("latent_format"))
    shape = (request.count, 4, side, side)
    recipe = recipes.of(model)
    if most_steps:
        recipe = recipe.at_most(most_steps)
    latents = comfy.sample.fix_empty_latent_channels(model, torch.zeros(shape))
    seed %= 2**64
    noise = comfy.sample.prepare_noise(latents, seed)

    def sample(part: slice) -> Tensor:
        start, stop, _ = part.indices(request.count)
        return comfy.sample.sample(
            model,
            noise[part],
            recipe.steps,
            recipe.cfg,
            recipe.sampler,
            recipe.scheduler,
            conditioning,
            zeros(conditioning),
            latents[part],
            callback=_callback(model, watch, recipe.steps, start / request.count, (stop - start) / request.count),
            disable_pbar=True,
            seed=seed,
        )

    samples = _at_once_or_one_by_one(sample, request.count)
    guidance = conditioning[0][1].get("guidance") if recipes.takes_guidance(model) else None
    return GeneratedReferences(samples, seed, recipe, guidance) if bool(torch.isfinite(samples).all()) else None


def draw_many(model, conditioning: list, count: int, side: int, seed: int) -> list[Tensor] | None:
    """As `draw_plain`, a few at once: the latents of each picture."""
    latents: list[Tensor] = []
    while len(latents) < count:
        request = ReferenceRequest(min(_AT_ONCE, count - len(latents)), side)
        drawn = draw_plain(model, conditioning, request, seed + len(latents))
        if drawn is None:
            return None
        latents += drawn.latents.split(1)
    return latents


@dataclass(frozen=True)
class Drawing:
    """How to draw a picture, as the host's KSampler calls it; width and height in pixels."""

    seed: int
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    width: int
    height: int

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of range, naming the input."""
        SEED.check("seed", self.seed)
        DRAWING_STEPS.check("steps", self.steps)
        CFG.check("cfg", self.cfg)
        one_of("sampler_name", self.sampler_name, SAMPLERS)
        one_of("scheduler", self.scheduler, SCHEDULERS)
        DRAWN.check("width", self.width)
        DRAWN.check("height", self.height)


def draw_one(model, positive: list, negative: list, drawing: Drawing, watch: Watch) -> Tensor:
    """Latents of one picture: bit for bit what Empty Latent Image and KSampler make. model: ModelPatcher, unchanged.

    watch: as of `draw_plain`.
    """
    ratio = _spacing(model.get_model_object("latent_format"))
    shape = (1, 4, drawing.height // ratio, drawing.width // ratio)
    empty = torch.zeros(shape, device=comfy.model_management.intermediate_device())
    latents = comfy.sample.fix_empty_latent_channels(model, empty)
    samples: Tensor = comfy.sample.sample(
        model,
        comfy.sample.prepare_noise(latents, drawing.seed),
        drawing.steps,
        drawing.cfg,
        drawing.sampler_name,
        drawing.scheduler,
        positive,
        negative,
        latents,
        callback=_callback(model, watch, drawing.steps, 0.0, 1.0),
        disable_pbar=True,
        seed=drawing.seed,
    )
    return samples


def _callback(model, watch: Watch | None, steps: int, before: float, mine: float) -> Callable[..., None]:
    """The sampler's, of pictures that are so much of all of them, after so many others."""
    if watch is None:
        return latent_preview.prepare_callback(model, steps)
    previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)

    def callback(step: int, x0: Tensor, _: Tensor, steps: int) -> None:
        preview = previewer.decode_latent_to_preview_image("JPEG", x0)[1] if previewer else None
        watch(before + mine * (step + 1) / steps, preview)

    return callback


def _at_once_or_one_by_one(sample: Callable[[slice], Tensor], count: int) -> Tensor:
    """All pictures in one batch or, where memory runs out for that, one after another: the same pictures."""
    try:
        return sample(slice(None))
    except Exception as error:
        if count == 1 or not is_out_of_memory(error):
            raise
    logging.warning("ZipLoRA: not enough memory to draw %d pictures at once; one by one.", count)
    comfy.model_management.soft_empty_cache()
    return torch.cat([sample(slice(i, i + 1)) for i in range(count)])


def best_side(model) -> int:
    """Side in pixels of a square picture that a model draws best, by its family: 512 for SD 1.5 and 2, else 1024.

    model: ModelPatcher. A configuration of the host's that another pack has added may say its own, as `picture_side`.
    """
    form = model.get_model_object("latent_format")
    known = 512 if isinstance(form, comfy.latent_formats.SD15) else 1024
    # Of the class: newer hosts' configurations answer None, with a warning, to every name that they have not.
    return getattr(type(model.model.model_config), "picture_side", known)


def thumbnails(model, latents: Tensor) -> Tensor | None:
    """Rough small pictures of latents, an IMAGE (N, H, W, 3), from the host's color factors; None without these."""
    form = model.get_model_object("latent_format")
    factors = getattr(form, "latent_rgb_factors", None)
    if factors is None:
        return None
    previewer = latent_preview.Latent2RGBPreviewer(
        factors, getattr(form, "latent_rgb_factors_bias", None), getattr(form, "latent_rgb_factors_reshape", None)
    )
    ready = form.process_in(latents.float())
    pictures = [previewer.decode_latent_to_preview(x[None]) for x in ready]
    side = max(256, pictures[0].width)
    enlarged = [p.resize((side, side * p.height // p.width), Image.Resampling.BICUBIC) for p in pictures]
    return torch.stack([_pixels(p) for p in enlarged])


def _pixels(picture: Image.Image) -> Tensor:
    raw = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
    return raw.reshape(picture.height, picture.width, 3) / 255
