"""The coefficients by gradient descent (arXiv 2311.13600, Sec. 3.3 and 4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .branch import JoinedSet
from .coefficients import Coefficients
from .draws import training_batches
from .retention import measure_retention, retentions
from .solver import Batch, Losses, NotFinite, Predictor, References, Result, Settings, Step

_ZERO_OVERLAP = 1e-4  # mean |m_c ⊙ m_s|; Adam reaches zero only nearly
MAX_SKIPPED = 12  # updates in a row that may be lost to an overflow in half precision
_BETAS_FROM_START = (0.8, 0.999)  # few steps: less memory of the first ones


def optimize(
    joined: JoinedSet,
    predictor: Predictor,
    references: References,
    settings: Settings,
    on_step: Callable[[Step], None] | None = None,
    start: Coefficients | None = None,
) -> Result:
    """Learn the coefficients (Eq. 3) with Adam, from all ones or from `start`, for at most `settings.steps` updates.

    One step is one teacher pass without gradient and one student pass with it (more of each where concepts
    cannot share a batch). Stops early when no two LoRAs overlap, as the paper does. `on_step` is called
    after each update; what it or the predictor raises ends the run. Deterministic for a seed on one machine.
    From a `start`, where there is no way to go but noise to settle, the result is the mean over the last half of
    the steps. Raises NotFinite when a loss is not finite.
    """
    averaged, betas = 1, (0.9, 0.999)
    if start is not None:
        averaged, betas = max(1, settings.steps // 2), _BETAS_FROM_START
    start = start or joined.ones()
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
                parts = ", ".join(f"{concept} {loss:g}" for concept, loss in losses.retention.items())
                raise stopped(step, f"the loss is not finite ({parts}, overlap {losses.overlap:g})")
            finite.copy_(flat.detach())
            gradient = flat.grad
            if gradient is None:
                raise ValueError("no layer of the LoRAs took part in the forward pass, so there is nothing to learn")
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
            if _overlap_vanished(joined, flat):
                return Result(joined.unflatten(flat), history, "the overlap reached zero")
        return Result(joined.unflatten(mean), history)


def _weights(joined: JoinedSet, predictor: Predictor, references: References, settings: Settings) -> dict[str, float]:
    """What each retention is multiplied by: 1, or for a relative objective its inverse at the direct merge."""
    if not settings.objective.relative:
        return dict.fromkeys(joined.concepts, 1.0)
    (at_start,) = measure_retention(
        joined, predictor, references, [joined.ones()], settings.seed + 1, retention=settings.objective.retention
    )
    return {concept: 1 / value if value else 1.0 for concept, value in at_start.items()}


def _overlap_vanished(joined: JoinedSet, flat: Tensor) -> bool:
    """Whether no two LoRAs keep a column in common: the paper's stop. Column by column, so that signs cannot cancel."""
    vanished = [
        bool((one * other).abs().mean() < _ZERO_OVERLAP) for one, other, _ in joined.shared_columns(flat.detach())
    ]
    return bool(vanished) and all(vanished)


def accumulate_gradient(
    joined: JoinedSet,
    predictor: Predictor,
    flat: Tensor,
    batches: Sequence[Batch],
    settings: Settings,
    weights: dict[str, float],
    scale: float = 1.0,
) -> Losses:
    """The objective on the rows of one step; adds the gradient of scale · loss to `flat.grad`.

    Every concept's retention, and λ times the overlap of each two. flat: (coefficient_count,) leaf that requires a
    gradient. weights: of each concept's retention. Concepts may come in one batch or in several: the loss and the
    gradient are the same.
    """
    values = dict.fromkeys(joined.concepts, 0.0)
    for batch in batches:
        with torch.no_grad():
            teacher = predictor(batch, joined.teacher(batch.concept_index))
        student = predictor(batch, joined.student(flat))
        losses = retentions(student, teacher, joined.rows(batch.concept_index), settings.objective.retention)
        losses = {concept: loss * weights[concept] for concept, loss in losses.items()}
        torch.autograd.backward(torch.stack(list(losses.values())).sum() * scale)
        for concept, loss in losses.items():
            values[concept] = loss.item()
    overlap = 0.0
    for one, other, sizes in joined.shared_columns(flat):  # one after another: no more than two vectors are kept
        of_two = settings.objective.overlap(one, other, sizes)
        torch.autograd.backward(of_two * (settings.similarity_lambda * scale))
        overlap += of_two.item()
    return Losses(values, overlap, sum(values.values()) + settings.similarity_lambda * overlap)
