"""What figures taken before a zip say of it: a LoRA that does nothing, prompts that are wrong or swapped, or worth it.

Change of a prediction: ‖with the LoRA − bare model‖₂ over ‖bare model‖₂, on pictures that the bare model draws of the
prompt. Every bound here was chosen by benchmarks/verdicts.py on its first block alone, and is measured on the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .solver import EMPTY, OTHER, OWN
from .words import WordEffect, swapped

IDLE = 0.01  # a smaller change of predictions is none
MORE = 1.65  # the least change with the prompt, in parts of that without, of a LoRA whose words do not speak to it
MORE_UNHEARD = 1.23  # the same where no layer of the LoRA reads the prompt by itself
ENOUGH = 0.5  # of what a LoRA does, the largest part that stacking may spoil before zipping is worth it


@dataclass(frozen=True)
class Effect:
    """What one LoRA does before it is zipped.

    change: under its own prompt, an empty one, and of two LoRAs the other's (OWN, EMPTY, OTHER). spoiled: how far
    stacking draws from the LoRA alone, in parts of how far the bare model does; 0 for one LoRA. words: None where it
    changes no layer that reads the prompt by itself.
    """

    change: Mapping[str, float]
    spoiled: float = 0.0
    words: WordEffect | None = None

    @property
    def idle(self) -> bool:
        """Whether it does nothing under its own prompt."""
        return self.change[OWN] < IDLE

    @property
    def more(self) -> float:
        """Its change under its own prompt in parts of that under an empty one; NaN for numbers that are not finite."""
        own, empty = self.change[OWN], self.change[EMPTY]
        if not (math.isfinite(own) and math.isfinite(empty)):
            return math.nan
        return own / empty if empty > 0 else math.inf

    @property
    def woken(self) -> bool:
        """Whether its prompt wakes it: the words speak to it, or it does clearly more with them than without."""
        if self.words is None:
            return self.more >= MORE_UNHEARD
        return self.words.speaks or self.more >= MORE


@dataclass(frozen=True)
class Finding:
    """What is found of LoRAs that are about to be zipped. idle, asleep: concepts."""

    idle: tuple[str, ...] = ()
    swapped: bool = False
    asleep: tuple[str, ...] = ()
    enough: bool = False

    @property
    def good(self) -> bool:
        """Whether nothing is wrong with LoRAs and prompts."""
        return not (self.idle or self.swapped or self.asleep)


def find(effects: Mapping[str, Effect]) -> Finding:
    """By concept. What makes another figure worthless hides it: of an idle LoRA no prompt is judged, of swapped ones
    neither is."""
    idle = tuple(concept for concept, effect in effects.items() if effect.idle)
    turned = not idle and _swapped(effects)
    asleep = () if turned else tuple(c for c, effect in effects.items() if not effect.idle and not effect.woken)
    enough = all(effect.spoiled <= ENOUGH for effect in effects.values())
    return Finding(idle, turned, asleep, enough)


def _swapped(effects: Mapping[str, Effect]) -> bool:
    heard = {concept: effect.words for concept, effect in effects.items() if effect.words is not None}
    if len(heard) == len(effects):
        return swapped(heard)
    return len(effects) == 2 and all(
        effect.change.get(OTHER, 0.0) > MORE_UNHEARD * effect.change[OWN] for effect in effects.values()
    )
