"""How much of each LoRA a merge keeps (arXiv 2311.13600, Eq. 3), measured on noise that no step saw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .branch import Branch, JoinedSet
from .coefficients import Coefficients
from .draws import spread_batches
from .objective import norm
from .solver import Predictor, References

_HELD_OUT = 0x5EED  # added to the seed: noise for measuring is never noise that was trained on
DRAWS = 4  # noisy latents of each reference that a retention is measured on


def retentions(
    student: Tensor, teacher: Tensor, rows: Mapping[str, int], retention: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Retention of each concept that has rows in this batch. rows: concept -> how many, one concept after another."""
    parts = zip(rows, *(torch.split(output, list(rows.values())) for output in (student, teacher)), strict=True)
    return {concept: retention(own, target) for concept, own, target in parts if len(own)}


def measure_retention(
    joined: JoinedSet,
    predictor: Predictor,
    references: References,
    candidates: Sequence[Coefficients | Branch],
    seed: int,
    draws: int = DRAWS,
    retention: Callable[[Tensor, Tensor], Tensor] = norm,
    merged: JoinedSet | None = None,
) -> list[dict[str, float]]:
    """Retention of each concept on noise that no training saw, for each candidate: the honest figure.

    Mean over `draws` timesteps spread over the schedule of ‖student − teacher‖₂ (Eq. 3, all terms but the last).
    Returns concept -> float per candidate; 0 means "draws exactly as its own LoRA".
    candidates: coefficients, or students of their own. merged: the set that the coefficients are of, where it is not
    `joined`, whose LoRAs are the teachers.
    """
    merged = merged or joined
    totals = [dict.fromkeys(joined.concepts, 0.0) for _ in candidates]
    with torch.inference_mode(False), torch.no_grad():
        students = [c if isinstance(c, Branch) else merged.student(merged.flatten(c)) for c in candidates]
        for batches in spread_batches(references, predictor, seed + _HELD_OUT, draws):
            for batch in batches:
                rows = joined.rows(batch.concept_index)
                teacher = predictor(batch, joined.teacher(batch.concept_index))
                for total, branch in zip(totals, students, strict=True):
                    student = predictor(batch, branch)
                    for concept, loss in retentions(student, teacher, rows, retention).items():
                        total[concept] += loss.item() / draws
    return totals
