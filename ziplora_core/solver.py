"""Finding the merger coefficients by gradient descent (arXiv 2311.13600, Sec. 3.3 and 4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from . import objective
from .branch import Branch, JoinedPair
from .coefficients import Coefficients

_HELD_OUT = 0x5EED  # added to the seed: noise for measuring is never noise that was trained on
_ZERO_OVERLAP = 1e-4  # mean |m_c ⊙ m_s|; Adam reaches zero only nearly
_MAX_SKIPPED = 12  # updates in a row that may be lost to an overflow in half precision


@dataclass(frozen=True)
class Settings:
    """The paper's settings are the defaults. Raises ValueError for a value out of range, naming it."""

    steps: int = 100
    learning_rate: float = 0.01
    similarity_lambda: float = 0.01
    batch_size: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        _in_range("steps", self.steps, 0, 10_000)
        _in_range("learning_rate", self.learning_rate, 1e-8, 10.0)
        _in_range("similarity_lambda", self.similarity_lambda, 0.0, 1000.0)
        _in_range("batch_size", self.batch_size, 1, 64)
        _in_range("seed", self.seed, 0, 2**64 - 1)


def _in_range(name: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"{name} is {value}; expected a number from {low:g} to {high:g}")


@dataclass(frozen=True)
class References:
    """Clean latents in the model's own space: content (N, C, *space) and style (M, C, *space')."""

    content: Tensor
    style: Tensor


@dataclass(frozen=True)
class Batch:
    """Rows of one forward pass. The predictor noises them with its own schedule.

    latents, noise: (rows, C, *space) float32. timesteps: (rows,) int64 in [0, predictor.timesteps).
    is_style: (rows,) bool, which reference and prompt a row belongs to; content rows come first.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    is_style: Tensor


class Predictor(Protocol):
    """A frozen network that draws with a branch added to its layers.

    timesteps: number of training timesteps. joins: whether content and style rows may share a pass.
    loss_scale: factor on the loss before backward (1 except where half precision would underflow).
    Calling it returns the raw prediction (rows, C, *space), float32 or wider, differentiable in the branch.
    """

    timesteps: int
    joins: bool
    loss_scale: float

    def __call__(self, batch: Batch, branch: Branch) -> Tensor: ...


@dataclass(frozen=True)
class Losses:
    """The terms of Eq. 3: retention of each concept, Σ|m_c · m_s| (not yet times λ), and their weighted sum."""

    content: float
    style: float
    overlap: float
    total: float


@dataclass(frozen=True)
class Step:
    """Losses of one step, before its update. `index` counts from 1."""

    index: int
    steps: int
    losses: Losses


@dataclass(frozen=True)
class Result:
    """coefficients, the losses of each step, and why the optimisation ended."""

    coefficients: Coefficients
    history: list[Step] = field(default_factory=list)
    stopped: str = "all steps done"


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
    """Endless steps of fresh noise; t uniform over the training timesteps. Drawn on the CPU: one seed, one run."""
    generator = torch.Generator().manual_seed(settings.seed % 2**63)
    while True:
        content, style = (
            _draw(
                latents,
                torch.randint(predictor.timesteps, (settings.batch_size,), generator=generator),
                is_style,
                generator,
            )
            for latents, is_style in ((references.content, False), (references.style, True))
        )
        yield _join_batches(content, style, predictor.joins)


def held_out_batches(references: References, predictor: Predictor, seed: int, draws: int) -> Iterator[list[Batch]]:
    """Noise apart from training's, at `draws` timesteps spread evenly over the schedule."""
    generator = torch.Generator().manual_seed((seed + _HELD_OUT) % 2**63)
    for i in range(draws):
        t = torch.tensor([int((i + 0.5) / draws * predictor.timesteps)])
        yield _join_batches(
            _draw(references.content, t, False, generator),
            _draw(references.style, t, True, generator),
            predictor.joins,
        )


def _retentions(student: Tensor, teacher: Tensor, is_style: Tensor) -> dict[str, Tensor]:
    """Retention of each concept that has rows in this batch."""
    return {
        concept: objective.retention(student[rows], teacher[rows])
        for concept, rows in (("content", ~is_style), ("style", is_style))
        if rows.any()
    }


def optimise(
    joined: JoinedPair,
    predictor: Predictor,
    references: References,
    settings: Settings,
    on_step: Callable[[Step], None] | None = None,
) -> Result:
    """Learn m_c and m_s (Eq. 3) with Adam, from all ones, for at most `settings.steps` updates.

    One step is one teacher pass without gradient and one student pass with it (two of each where content and
    style cannot share a batch). Stops early when the overlap is zero, as the paper does. `on_step` is called
    after each update; what it or the predictor raises ends the run. Deterministic for a seed on one machine.
    Raises FloatingPointError when a loss is not finite.
    """
    ones = Coefficients.ones(joined.pair)
    if settings.steps == 0:
        return Result(ones, stopped="no steps asked for: the direct merge")
    with torch.inference_mode(False), torch.enable_grad():
        flat = joined.flatten(ones).requires_grad_(True)
        adam = torch.optim.Adam([flat], lr=settings.learning_rate)
        scale, skipped = float(predictor.loss_scale), 0
        history: list[Step] = []
        batches = training_batches(references, predictor, settings)
        while len(history) < settings.steps:
            losses = accumulate_gradient(joined, predictor, flat, next(batches), settings.similarity_lambda, scale)
            step = Step(len(history) + 1, settings.steps, losses)
            _check_finite(step)
            gradient = flat.grad
            if gradient is None:
                raise ValueError("no layer of the pair took part in the forward pass, so there is nothing to learn")
            if not bool(torch.isfinite(gradient).all()):
                skipped, scale = skipped + 1, scale / 4
                adam.zero_grad()
                if skipped > _MAX_SKIPPED:
                    raise FloatingPointError(
                        f"step {step.index}: the gradient is not finite although the loss ({losses.total:g}) is, "
                        f"after {skipped} tries at smaller loss scales; load the model in bf16 or fp32"
                    )
                continue
            skipped = 0
            gradient.div_(scale)
            adam.step()
            adam.zero_grad()
            history.append(step)
            if on_step is not None:
                on_step(step)
            if _closed(joined, flat):
                return Result(joined.unflatten(flat), history, "the overlap reached zero")
        return Result(joined.unflatten(flat), history)


def _closed(joined: JoinedPair, flat: Tensor) -> bool:
    """Whether no column is left in both LoRAs: the paper's stop. Column by column, so that signs cannot cancel."""
    shared = [torch.stack(pair) for pair in joined.shared_columns(flat.detach())]
    if not shared:
        return False
    content, style = torch.cat(shared, dim=1)
    return bool((content * style).abs().mean() < _ZERO_OVERLAP)


def _check_finite(step: Step) -> None:
    losses = step.losses
    if not math.isfinite(losses.total):
        raise FloatingPointError(
            f"step {step.index}: the loss is not finite (content {losses.content:g}, style {losses.style:g}, "
            f"overlap {losses.overlap:g}); lower learning_rate or load the model in bf16 or fp32"
        )


def accumulate_gradient(
    joined: JoinedPair,
    predictor: Predictor,
    flat: Tensor,
    batches: Sequence[Batch],
    similarity_lambda: float,
    scale: float = 1.0,
) -> Losses:
    """Eq. 3 on the rows of one step; adds the gradient of scale · loss to `flat.grad`.

    flat: (pair.coefficient_count,) leaf that requires a gradient. Content and style may come in one batch or
    in two: the loss and the gradient are the same.
    """
    values = {"content": 0.0, "style": 0.0}
    for batch in batches:
        with torch.no_grad():
            teacher = predictor(batch, joined.teacher(batch.is_style))
        student = predictor(batch, joined.student(flat))
        losses = _retentions(student, teacher, batch.is_style.to(teacher.device))
        torch.autograd.backward(torch.stack(list(losses.values())).sum() * scale)
        for concept, loss in losses.items():
            values[concept] = loss.item()
    overlap = objective.overlap(joined.shared_columns(flat))
    if overlap.requires_grad:
        torch.autograd.backward(overlap * (similarity_lambda * scale))
    total = values["content"] + values["style"] + similarity_lambda * overlap.item()
    return Losses(values["content"], values["style"], overlap.item(), total)


def measure_retention(
    joined: JoinedPair,
    predictor: Predictor,
    references: References,
    candidates: Sequence[Coefficients],
    seed: int,
    draws: int = 4,
) -> list[dict[str, float]]:
    """Retention of each concept on noise that no training saw, for each candidate: the honest figure.

    Mean over `draws` timesteps spread over the schedule of ‖student − teacher‖₂ (Eq. 3, first two terms).
    Returns {"content": float, "style": float} per candidate; 0 means "draws exactly as its own LoRA".
    """
    totals = [{"content": 0.0, "style": 0.0} for _ in candidates]
    with torch.inference_mode(False), torch.no_grad():
        flats = [joined.flatten(c) for c in candidates]
        for batches in held_out_batches(references, predictor, seed, draws):
            for batch in batches:
                teacher = predictor(batch, joined.teacher(batch.is_style))
                for total, flat in zip(totals, flats, strict=True):
                    student = predictor(batch, joined.student(flat))
                    for concept, loss in _retentions(student, teacher, batch.is_style.to(teacher.device)).items():
                        total[concept] += loss.item() / draws
    return totals
