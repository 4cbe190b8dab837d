"""Noisy rows of the references: at which timesteps and with which noise, drawn again by their seed."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from .solver import Batch, Predictor, References, Settings

GOLDEN = (5**0.5 - 1) / 2  # its multiples modulo 1 are the golden-ratio low-discrepancy sequence


def _draw(latents: Tensor, timesteps: Tensor, concept_index: int, generator: torch.Generator) -> Batch:
    rows = len(timesteps)
    chosen = torch.randint(latents.shape[0], (rows,), generator=generator)
    picked = latents[chosen.to(latents.device)].float()
    noise = torch.randn(picked.shape, generator=generator)
    return Batch(picked, noise.to(picked.device), timesteps, torch.full((rows,), concept_index))


def _step(references: References, timesteps: Sequence[Tensor], joins: bool, generator: torch.Generator) -> list[Batch]:
    """Rows of every concept, as few batches as `_join` allows. timesteps: of each concept, (rows,) int64.

    Drawn by the concepts' names, one after another: LoRAs in another order see the same noise.
    """
    indices = {concept: index for index, concept in enumerate(references)}
    drawn = {c: _draw(references[c], t, indices[c], generator) for c, t in zip(sorted(indices), timesteps, strict=True)}
    return _join([drawn[concept] for concept in references], joins)


def _join(batches: Sequence[Batch], joins: bool) -> list[Batch]:
    """One batch where the predictor and the shapes allow it, else several: gradients add up all the same."""
    alike: dict[Hashable, list[Batch]] = {}
    for number, batch in enumerate(batches):
        alike.setdefault(batch.latents.shape[1:] if joins else number, []).append(batch)
    return [
        Batch(
            torch.cat([b.latents for b in group]),
            torch.cat([b.noise for b in group]),
            torch.cat([b.timesteps for b in group]),
            torch.cat([b.concept_index for b in group]),
        )
        for group in alike.values()
    ]


def training_batches(references: References, predictor: Predictor, settings: Settings) -> Iterator[list[Batch]]:
    """Endless steps of fresh noise; t uniform over the training timesteps. Drawn on the CPU: one seed, one run.

    Successive timesteps follow a low-discrepancy sequence from a random start, so that few steps cover the schedule.
    """
    generator = torch.Generator().manual_seed(settings.seed % 2**63)
    offsets = torch.rand(len(references), generator=generator, dtype=torch.float64)
    for first in itertools.count(step=settings.batch_size):
        fractions = (torch.arange(first, first + settings.batch_size) * GOLDEN + offsets[:, None]) % 1
        timesteps = [(row * predictor.timesteps).long() for row in fractions]
        yield _step(references, timesteps, predictor.joins, generator)


def spread_batches(references: References, predictor: Predictor, seed: int, draws: int) -> Iterator[list[Batch]]:
    """All references with fresh noise, at `draws` timesteps spread evenly over the schedule."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    for i in range(draws):
        t = torch.tensor([int((i + 0.5) / draws * predictor.timesteps)])
        yield _step(references, [t] * len(references), predictor.joins, generator)
