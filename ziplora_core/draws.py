"""Noisy rows of the references: at which timesteps and with which noise, drawn again by their seed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from .solver import Batch, Predictor, References, Settings

GOLDEN = (5**0.5 - 1) / 2  # multiples of it modulo 1 are spread evenly, however many are taken


def _draw(latents: Tensor, timesteps: Tensor, is_style: bool, generator: torch.Generator) -> Batch:
    rows = len(timesteps)
    chosen = torch.randint(latents.shape[0], (rows,), generator=generator)
    picked = latents[chosen.to(latents.device)].float()
    noise = torch.randn(picked.shape, generator=generator)
    return Batch(picked, noise.to(picked.device), timesteps, torch.full((rows,), is_style))


def _join_batches(content: Batch, style: Batch, joins: bool) -> list[Batch]:
    """One batch where the predictor and the shapes allow it, else two: gradients add up all the same."""
    if not joins or content.latents.shape[1:] != style.latents.shape[1:]:
        return [content, style]
    return [
        Batch(
            torch.cat([content.latents, style.latents]),
            torch.cat([content.noise, style.noise]),
            torch.cat([content.timesteps, style.timesteps]),
            torch.cat([content.is_style, style.is_style]),
        )
    ]


def training_batches(references: References, predictor: Predictor, settings: Settings) -> Iterator[list[Batch]]:
    """Endless steps of fresh noise; t uniform over the training timesteps. Drawn on the CPU: one seed, one run.

    Successive timesteps are spread evenly (an additive recurrence from a random start), so that few steps see all
    of the schedule.
    """
    generator = torch.Generator().manual_seed(settings.seed % 2**63)
    offsets = torch.rand(2, generator=generator, dtype=torch.float64)
    for first in itertools.count(step=settings.batch_size):
        places = (torch.arange(first, first + settings.batch_size) * GOLDEN + offsets[:, None]) % 1
        content, style = (
            _draw(latents, (place * predictor.timesteps).long(), is_style, generator)
            for latents, is_style, place in zip(
                (references.content, references.style), (False, True), places, strict=True
            )
        )
        yield _join_batches(content, style, predictor.joins)


def spread_batches(references: References, predictor: Predictor, seed: int, draws: int) -> Iterator[list[Batch]]:
    """Both references with fresh noise, at `draws` timesteps spread evenly over the schedule."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    for i in range(draws):
        t = torch.tensor([int((i + 0.5) / draws * predictor.timesteps)])
        yield _join_batches(
            _draw(references.content, t, False, generator),
            _draw(references.style, t, True, generator),
            predictor.joins,
        )
