"""Finding the merger coefficients by gradient descent (arXiv 2311.13600, Sec. 3.3 and 4)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .branch import Branch, JoinedPair
from .coefficients import Coefficients
from .files import shown
from .objective import BALANCED, Objective, norm
from .pair import LoRAPair

_HELD_OUT = 0x5EED  # added to the seed: noise for measuring is never noise that was trained on
_ZERO_OVERLAP = 1e-4  # mean |m_c ⊙ m_s|; Adam reaches zero only nearly
DRAWS = 4  # noisy latents of each reference that a retention is measured on
MAX_SKIPPED = 12  # updates in a row that may be lost to an overflow in half precision


SOLVERS = ("layerwise", "layerwise, then gradient", "gradient")
_BETAS_FROM_START = (0.8, 0.999)  # few steps: less memory of the first ones
OWN, EMPTY, OTHER = "own", "empty", "other"  # prompts of a row: its concept's, none, the other concept's
GOLDEN = (5**0.5 - 1) / 2  # multiples of it modulo 1 are spread evenly, however many are taken


@dataclass(frozen=True)
class Settings:
    """Raises ValueError for a value out of range, naming it.

    solver: "layerwise" in closed form, which takes no steps (but 0 give the direct merge, whatever the solver);
    "gradient" from all ones, as the paper, which takes 100 at 0.01; or the first as the second's start.
    ridge: pull of the layer-wise solve towards the merge by the weights alone, in parts of each layer's mean diagonal.
    """

    steps: int = 10
    learning_rate: float = 0.01
    similarity_lambda: float = 0.01
    batch_size: int = 1
    seed: int = 0
    objective: Objective = BALANCED
    solver: str = SOLVERS[0]
    ridge: float = 1.0

    def __post_init__(self) -> None:
        in_range("steps", self.steps, 0, 10_000)
        in_range("learning_rate", self.learning_rate, 1e-8, 10.0)
        in_range("similarity_lambda", self.similarity_lambda, 0.0, 1000.0)
        in_range("batch_size", self.batch_size, 1, 64)
        in_range("ridge", self.ridge, 1e-6, 1e6)
        in_range("seed", self.seed, 0, 2**64 - 1)
        one_of("solver", self.solver, SOLVERS)

    @property
    def gradient_steps(self) -> int:
        """Steps that the solver will take."""
        return 0 if self.solver == "layerwise" else self.steps


def in_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # NaN is in no range
        raise ValueError(f"{name} is {shown(str(value), 40)}; expected a number from {low:g} to {high:g}")


def one_of(name: str, value: object, options: Iterable[str]) -> None:
    known = list(options)  # a list may be asked for what has no hash
    if value not in known:
        raise ValueError(f"{name} is '{shown(str(value), 40)}'; expected one of: {', '.join(known)}")


@dataclass(frozen=True)
class References:
    """Clean latents in the model's own space: content (N, C, *space) and style (M, C, *space')."""

    content: Tensor
    style: Tensor


@dataclass(frozen=True)
class Batch:
    """Rows of one forward pass. The predictor noises them with its own schedule.

    latents, noise: (rows, C, *space) float32. timesteps: (rows,) int64 in [0, predictor.timesteps).
    is_style: (rows,) bool, which reference and prompt a row belongs to; content rows come first. prompt: which one
    all rows are seen with, OWN but where prompts are compared.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    is_style: Tensor
    prompt: str = OWN


class Predictor(Protocol):
    """A frozen network that draws with a branch added to its layers.

    timesteps: number of training timesteps. joins: whether content and style rows may share a pass.
    loss_scale: factor on the loss before backward (1 except where half precision would underflow).
    Calling it returns the raw prediction (rows, C, *space), float32 or wider, differentiable in the branch. `target`
    gives the raw prediction that would find a batch's own clean latents.
    """

    timesteps: int
    joins: bool
    loss_scale: float

    def __call__(self, batch: Batch, branch: Branch) -> Tensor: ...

    def target(self, batch: Batch) -> Tensor: ...


@dataclass(frozen=True)
class Losses:
    """The terms of the objective: retention of each concept, overlap (not yet times λ), and their weighted sum."""

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
    """coefficients, the losses of each step, why they ended, and what is left of each layer's error (layer-wise)."""

    coefficients: Coefficients
    history: list[Step] = field(default_factory=list)
    stopped: str = "all steps done"
    left: dict[str, float] = field(default_factory=dict)


class NotFinite(FloatingPointError):
    """A run that ended because a number was not finite.

    step: at which. layer: whose coefficients had changed most since the start; empty where none had. kept: the steps
    before, with the coefficients of the last one whose loss was finite; None where there was none.
    """

    def __init__(self, what: str, step: int, start: Coefficients, now: Coefficients, kept: Result | None):
        concept, self.layer, by = now.most_changed(start)
        self.step, self.kept = step, kept
        changed = "no coefficient had changed yet"
        if self.layer:
            changed = f"the {concept} coefficients of layer '{self.layer}' had changed most, by {by:.3g}"
        super().__init__(f"step {step}: {what}; {changed}; lower learning_rate or load the model in bf16 or fp32")


def direct_merge(pair: LoRAPair) -> Result:
    """What no steps give: all ones."""
    return Result(Coefficients.ones(pair), stopped="no steps asked for: the direct merge")


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


def _retentions(
    student: Tensor, teacher: Tensor, is_style: Tensor, retention: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Retention of each concept that has rows in this batch."""
    return {
        concept: retention(student[rows], teacher[rows])
        for concept, rows in (("content", ~is_style), ("style", is_style))
        if rows.any()
    }


def optimise(
    joined: JoinedPair,
    predictor: Predictor,
    references: References,
    settings: Settings,
    on_step: Callable[[Step], None] | None = None,
    start: Coefficients | None = None,
) -> Result:
    """Learn m_c and m_s (Eq. 3) with Adam, from all ones or from `start`, for at most `settings.steps` updates.

    One step is one teacher pass without gradient and one student pass with it (two of each where content and
    style cannot share a batch). Stops early when the overlap is zero, as the paper does. `on_step` is called
    after each update; what it or the predictor raises ends the run. Deterministic for a seed on one machine.
    From a `start`, where there is no way to go but noise to settle, the result is the mean over the last half of
    the steps. Raises NotFinite when a loss is not finite.
    """
    averaged, betas = 1, (0.9, 0.999)
    if start is not None:
        averaged, betas = max(1, settings.steps // 2), _BETAS_FROM_START
    start = start or Coefficients.ones(joined.pair)
    if settings.steps == 0:
        return Result(start, stopped="no steps asked for")
    with torch.inference_mode(False), torch.enable_grad():
        flat = joined.flatten(start).requires_grad_(True)
        adam = torch.optim.Adam([flat], lr=settings.learning_rate, betas=betas)
        scale, skipped = float(predictor.loss_scale), 0
        history: list[Step] = []
        mean = torch.zeros_like(flat, requires_grad=False)
        finite = flat.detach().clone()  # the coefficients of the last finite loss

        def stopped(step: Step, what: str) -> NotFinite:
            kept = Result(joined.unflatten(finite), history, f"stopped at step {step.index}: {what}")
            return NotFinite(what, step.index, start, joined.unflatten(flat), kept if history else None)

        weights = _weights(joined, predictor, references, settings)
        batches = training_batches(references, predictor, settings)
        while len(history) < settings.steps:
            losses = accumulate_gradient(joined, predictor, flat, next(batches), settings, weights, scale)
            step = Step(len(history) + 1, settings.steps, losses)
            if not math.isfinite(losses.total):
                parts = f"content {losses.content:g}, style {losses.style:g}, overlap {losses.overlap:g}"
                raise stopped(step, f"the loss is not finite ({parts})")
            finite.copy_(flat.detach())
            gradient = flat.grad
            if gradient is None:
                raise ValueError("no layer of the pair took part in the forward pass, so there is nothing to learn")
            if not bool(torch.isfinite(gradient).all()):
                skipped, scale = skipped + 1, scale / 4
                adam.zero_grad()
                if skipped > MAX_SKIPPED:
                    what = f"the gradient is not finite although the loss ({losses.total:g}) is"
                    raise stopped(step, f"{what}, after {skipped} tries at smaller loss scales")
                continue
            skipped = 0
            gradient.div_(scale)
            adam.step()
            adam.zero_grad()
            history.append(step)
            if settings.steps - step.index < averaged:
                mean += flat.detach() / averaged
            if on_step is not None:
                on_step(step)
            if _closed(joined, flat):
                return Result(joined.unflatten(flat), history, "the overlap reached zero")
        return Result(joined.unflatten(mean), history)


def _weights(joined: JoinedPair, predictor: Predictor, references: References, settings: Settings) -> dict[str, float]:
    """What each retention is multiplied by: 1, or for a relative objective its inverse at the direct merge."""
    if not settings.objective.relative:
        return {"content": 1.0, "style": 1.0}
    ones = [Coefficients.ones(joined.pair)]
    (at_start,) = measure_retention(
        joined, predictor, references, ones, settings.seed + 1, retention=settings.objective.retention
    )
    return {concept: 1 / value if value else 1.0 for concept, value in at_start.items()}


def _closed(joined: JoinedPair, flat: Tensor) -> bool:
    """Whether no column is left in both LoRAs: the paper's stop. Column by column, so that signs cannot cancel."""
    if not joined.shared_sizes:
        return False
    content, style = joined.shared_columns(flat.detach())
    return bool((content * style).abs().mean() < _ZERO_OVERLAP)


def accumulate_gradient(
    joined: JoinedPair,
    predictor: Predictor,
    flat: Tensor,
    batches: Sequence[Batch],
    settings: Settings,
    weights: dict[str, float],
    scale: float = 1.0,
) -> Losses:
    """The objective on the rows of one step; adds the gradient of scale · loss to `flat.grad`.

    flat: (pair.coefficient_count,) leaf that requires a gradient. weights: of each concept's retention. Content
    and style may come in one batch or in two: the loss and the gradient are the same.
    """
    values = {"content": 0.0, "style": 0.0}
    for batch in batches:
        with torch.no_grad():
            teacher = predictor(batch, joined.teacher(batch.is_style))
        student = predictor(batch, joined.student(flat))
        losses = _retentions(student, teacher, batch.is_style.to(teacher.device), settings.objective.retention)
        losses = {concept: loss * weights[concept] for concept, loss in losses.items()}
        torch.autograd.backward(torch.stack(list(losses.values())).sum() * scale)
        for concept, loss in losses.items():
            values[concept] = loss.item()
    overlap = flat.new_zeros(())
    if joined.shared_sizes:
        overlap = settings.objective.overlap(*joined.shared_columns(flat), joined.shared_sizes)
        torch.autograd.backward(overlap * (settings.similarity_lambda * scale))
    total = values["content"] + values["style"] + settings.similarity_lambda * overlap.item()
    return Losses(values["content"], values["style"], overlap.item(), total)


def measure_retention(
    joined: JoinedPair,
    predictor: Predictor,
    references: References,
    candidates: Sequence[Coefficients],
    seed: int,
    draws: int = DRAWS,
    retention: Callable[[Tensor, Tensor], Tensor] = norm,
    merged: JoinedPair | None = None,
) -> list[dict[str, float]]:
    """Retention of each concept on noise that no training saw, for each candidate: the honest figure.

    Mean over `draws` timesteps spread over the schedule of ‖student − teacher‖₂ (Eq. 3, first two terms).
    Returns {"content": float, "style": float} per candidate; 0 means "draws exactly as its own LoRA".
    merged: the pair that the candidates are coefficients of, where it is not `joined`, whose LoRAs are the teachers.
    """
    merged = merged or joined
    totals = [{"content": 0.0, "style": 0.0} for _ in candidates]
    with torch.inference_mode(False), torch.no_grad():
        flats = [merged.flatten(c) for c in candidates]
        for batches in spread_batches(references, predictor, seed + _HELD_OUT, draws):
            for batch in batches:
                teacher = predictor(batch, joined.teacher(batch.is_style))
                for total, flat in zip(totals, flats, strict=True):
                    student = predictor(batch, merged.student(flat))
                    for concept, loss in _retentions(
                        student, teacher, batch.is_style.to(teacher.device), retention
                    ).items():
                        total[concept] += loss.item() / draws
    return totals
