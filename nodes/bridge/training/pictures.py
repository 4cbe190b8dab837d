"""What a training node is given, checked, and as latents and prompts that the network takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ....ziplora_core import training
from ....ziplora_core.checks import Range
from ..network import checks

RESOLUTION = Range(64, 4096)  # side of a square bucket, in pixels
_EVERY, _MULTIPLE = 8, 64  # pixels of a latent, and what sides of buckets are multiples of


@dataclass(frozen=True)
class TrainingImages:
    """What a concept is learned from. pictures: IMAGEs (N, H, W, 3), of any sizes. prompts: one for all of them, or one
    for each picture, in order."""

    pictures: Sequence[Tensor]
    prompts: Sequence[str]

    @property
    def frames(self) -> list[Tensor]:
        return frames(self.pictures)


def frames(pictures: Sequence[Tensor]) -> list[Tensor]:
    """Each picture apart, (1, H, W, 3)."""
    return [frame[None] for batch in pictures for frame in batch]


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


def check_prompt(name: str, text: str) -> None:
    if not text.strip():
        raise ValueError(f"{name} is empty; write what the pictures show, with the word for what is new in them")
    check_letters(name, text)


def check_letters(name: str, text: str) -> None:
    """Raises ValueError for what no tokenizer can read."""
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


def encode(model, vae, frame: Tensor, resolution: int) -> Tensor:
    """A picture (1, H, W, 3), scaled to its bucket and cut to it around the middle, as latents.

    Raises ValueError where they cannot be this model's.
    """
    width, height = bucket(frame.shape[2], frame.shape[1], resolution)
    pixels = comfy.utils.common_upscale(frame[..., :3].movedim(-1, 1), width, height, "lanczos", "center")
    latents: Tensor = vae.encode(pixels.movedim(1, -1))
    checks.check_latents("what vae makes of a picture", latents, model)
    return latents


def prepared(model, clip, vae, sets: Sequence[TrainingImages], resolution: int) -> Prepared:
    """Latents and prompts of one concept or several: the work of the VAE and of the text encoder."""
    data = Prepared()
    concepts = []
    for images in sets:
        numbers = [data.prompt(clip, text) for text in images.prompts]
        examples = []
        for index, frame in enumerate(images.frames):
            latents = encode(model, vae, frame, resolution)
            examples.append(training.Example(latents, numbers[index % len(numbers)]))
        concepts.append(examples)
    data.pictures = training.Pictures(concepts)
    return data
