"""Whether a prompt activates its LoRA: what it does to predictions of the LoRA's references, against an empty prompt.

With L the error of a prediction, ‖D(x, p) − target‖₂, the gain of a LoRA under a prompt p is 1 − L(with it) / L(bare
model). A prompt that says something to the LoRA makes its gain larger than an empty prompt does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .branch import JoinedSet
from .coefficients import Coefficients
from .draws import spread_batches
from .solver import EMPTY, OTHER, OWN, Batch, Predictor, References

DRAWS = 3  # noisy latents of each reference, spread over the timesteps: two passes each for every prompt
FIRES = 0.77  # the largest `relative_error` of a prompt that activates its LoRA; chosen by benchmarks/prompts.py
_SEED = 0x9A0F  # added to the seed: noise apart from training's and from the other measurements'


@dataclass(frozen=True)
class PromptEffect:
    """What one LoRA does on its own references, by prompt ("own", "empty", and of two "other": the other concept's).

    change: ‖with it − bare model‖₂ over ‖bare model‖₂. gain: how much nearer to its references its predictions are
    than the bare model's, 1 at the most and below 0 where they are farther.
    """

    change: dict[str, float]
    gain: dict[str, float]

    def relative_error(self, prompt: str = OWN) -> float:
        """(1 − gain) under a prompt over (1 − gain) under the empty one: below one where the prompt activates the
        LoRA.

        NaN where one of them is not finite.
        """
        prompted, empty = 1 - self.gain[prompt], 1 - self.gain[EMPTY]
        if not (math.isfinite(prompted) and math.isfinite(empty)):
            return math.nan
        return prompted / empty if empty > 0 else 1.0

    @property
    def fires(self) -> bool:
        """Whether its own prompt activates it. False for numbers that are not finite."""
        return self.relative_error() < FIRES

    @property
    def swapped(self) -> bool:
        """Whether the other concept's prompt activates it and its own does not."""
        return not self.fires and OTHER in self.gain and self.relative_error(OTHER) < FIRES


def measure(
    joined: JoinedSet,
    predictor: Predictor,
    references: References,
    seed: int,
    draws: int = DRAWS,
    on_draw: Callable[[], None] | None = None,
    other: bool | None = None,
) -> dict[str, PromptEffect]:
    """PromptEffect of each concept: 4 · draws forward passes without gradient (of one or two batches each).

    other: whether they are two that are measured under the other concept's prompt too, in 2 · draws passes more; None
    for where a prompt does not activate its LoRA, which only references of the LoRAs tell.
    Deterministic for a seed.
    """
    with torch.inference_mode(False), torch.no_grad():
        bare = joined.flatten(Coefficients.ones(joined.loras)).zero_()
        seen: list[Batch] = []
        sums: dict[tuple[str, str], Tensor] = {}
        for batches in spread_batches(references, predictor, seed + _SEED, draws):
            seen += batches
            for batch in batches:
                _add(sums, joined, predictor, bare, batch, (OWN, EMPTY))
            if on_draw is not None:
                on_draw()
        effects = _effects(sums, joined.concepts, (OWN, EMPTY))
        wanted = not all(effect.fires for effect in effects.values()) if other is None else other
        if len(joined.concepts) == 2 and wanted:
            for batch in seen:
                _add(sums, joined, predictor, bare, batch, (OTHER,))
            effects = _effects(sums, joined.concepts, (OWN, EMPTY, OTHER))
    return effects


def _add(
    sums: dict[tuple[str, str], Tensor],
    joined: JoinedSet,
    predictor: Predictor,
    bare: Tensor,
    batch: Batch,
    prompts: Sequence[str],
) -> None:
    """Adds (‖with − without‖, ‖without‖, error with, error without) of a batch's rows, by concept and prompt."""
    target = predictor.target(batch)
    for prompt in prompts:
        prompted = replace(batch, prompt=prompt)
        with_lora = predictor(prompted, joined.teacher(batch.concept_index))
        without = predictor(prompted, joined.student(bare))
        parts = (with_lora - without, without, with_lora - target, without - target)
        norms = torch.stack([torch.linalg.vector_norm(part.flatten(1), dim=1) for part in parts])
        rows = joined.rows(batch.concept_index)
        for concept, own in zip(rows, torch.split(norms, list(rows.values()), dim=1), strict=True):
            if own.shape[1]:
                totals = own.sum(1).cpu().double()  # Apple's GPUs have no float64
                sums[concept, prompt] = sums.get((concept, prompt), torch.zeros(4, dtype=torch.float64)) + totals


def _effects(
    sums: dict[tuple[str, str], Tensor], concepts: Sequence[str], prompts: Sequence[str]
) -> dict[str, PromptEffect]:
    def ratio(above: Tensor, below: Tensor) -> float:
        if not (above.isfinite() and below.isfinite()):
            return math.nan
        return (above / below).item() if below > 0 else 0.0

    return {
        concept: PromptEffect(
            {p: ratio(sums[concept, p][0], sums[concept, p][1]) for p in prompts},
            {p: 1 - ratio(sums[concept, p][2], sums[concept, p][3]) for p in prompts},
        )
        for concept in concepts
    }
