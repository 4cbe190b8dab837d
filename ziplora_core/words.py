"""Whether a prompt's words speak to a LoRA, from its factors and from encoded prompts alone: no pass of a model.

A LoRA's layers that read the prompt learn from the words that it was trained with: its update of such a layer, a sum of
outer products with them, answers most to words like these. What it answers to ordinary words is the measure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .lora_set import Factors

SPEAK = 1.06  # the least `over_ordinary` of words that speak to their LoRA: half-way from wrong prompts to right ones
TURNED = 1.2  # by so much more than to its own prompt each LoRA answers to the other's where two are swapped
# Chosen by benchmarks/verdicts.py on its first block alone, but that SPEAK was lowered once after six pairs of the
# second had been seen; the third says the same under both. Of the miniature's LoRAs: others were not measured.
ORDINARY = (  # prompts that no LoRA is made for
    "a photo of a person",
    "a portrait of a woman",
    "a pencil drawing of a tree",
    "a landscape with mountains",
)


@dataclass(frozen=True)
class WordEffect:
    """How strongly a LoRA answers to its own prompt, the other LoRAs' prompts, and ordinary ones (`responses`)."""

    own: float
    others: Mapping[str, float]
    ordinary: Sequence[float]

    @property
    def over_ordinary(self) -> float:
        """The answer to its own prompt in parts of the strongest to an ordinary one; NaN where there is none."""
        most = max(self.ordinary, default=math.nan)
        return self.own / most if most > 0 else math.nan

    @property
    def speaks(self) -> bool:
        """Whether its own prompt speaks to it. False for numbers that are not finite."""
        return self.over_ordinary >= SPEAK


def responses(
    layers: Iterable[Factors], prompts: Sequence[Tensor], empty: Tensor, on_layer: Callable[[], None] | None = None
) -> list[float]:
    """Of each prompt, the mean over layers of ‖d·ΔWᵀ‖ · √n / (‖d‖ · ‖ΔW‖), Frobenius norms: 1 where ΔW answers to what
    the prompt says as to numbers at random, whatever the strength. d = prompt − empty, (tokens, n): what words add to
    none.

    prompts, empty: encoded, (tokens, n) of any dtype; where they differ in length, the empty one is repeated. 0 where
    nothing is said or every ΔW is zero. Layers of another width than n are left out. on_layer: called before each
    layer; what it raises ends it.
    """
    return _answers(layers, prompts, empty, on_layer)[0]


def _answers(
    layers: Iterable[Factors], prompts: Sequence[Tensor], empty: Tensor, on_layer: Callable[[], None] | None
) -> tuple[list[float], int]:
    """The responses, and of how many layers they are the mean."""
    said = [_said(prompt.float(), empty.float()) for prompt in prompts]
    sizes = [d.norm().item() for d in said]
    totals, counted = [0.0] * len(said), 0
    for factors in layers:
        if on_layer is not None:
            on_layer()
        up, down = factors.up.float(), factors.down.float()
        if down.ndim != 2 or down.shape[1] != empty.shape[1]:
            continue
        whole_update = _is_unit(up)  # `down` is ΔW itself: products with a unit matrix of its size take seconds
        whole = (down.norm() if whole_update else _size(up, down)).item()
        if not whole:
            continue
        counted += 1
        for place, (d, size) in enumerate(zip(said, sizes, strict=True)):
            if size:
                made = d @ down.T
                answer = (made if whole_update else made @ up.T).norm().item()
                totals[place] += answer / (size * whole) * math.sqrt(down.shape[1])
    return [total / counted if counted else 0.0 for total in totals], counted


def _size(up: Tensor, down: Tensor) -> Tensor:
    """‖up · down‖, the product never formed."""
    return ((up.T @ up) * (down @ down.T)).sum().clamp_min(0).sqrt()


def _is_unit(up: Tensor) -> bool:
    return up.shape[0] == up.shape[1] and torch.equal(up, torch.eye(len(up), dtype=up.dtype, device=up.device))


def _said(prompt: Tensor, empty: Tensor) -> Tensor:
    times = math.ceil(len(prompt) / len(empty))
    return prompt - empty.repeat(times, 1)[: len(prompt)]


def measure(
    layers: Sequence[Factors],
    concept: str,
    prompts: Mapping[str, Tensor],
    ordinary: Sequence[Tensor],
    empty: Tensor,
    on_layer: Callable[[], None] | None = None,
) -> WordEffect | None:
    """WordEffect of one LoRA; None where no layer of it can hear: all are zero, or of another width than the prompts.

    layers: those of it that read the prompt. prompts: of every concept; they, ordinary and empty are encoded,
    (tokens, n), as a user of that LoRA has them encoded. on_layer: as of `responses`.
    """
    with torch.no_grad():
        found, counted = _answers(layers, [*prompts.values(), *ordinary], empty, on_layer)
    if not counted:
        return None
    answers = dict(zip(prompts, found, strict=False))
    return WordEffect(answers.pop(concept), answers, found[len(prompts) :])


def swapped(effects: Mapping[str, WordEffect]) -> bool:
    """Whether each of two LoRAs answers to the other's prompt much more than to its own."""
    return len(effects) == 2 and all(
        len(effect.others) == 1 and max(effect.others.values()) > TURNED * effect.own for effect in effects.values()
    )
