"""What figures taken before a zip say of it: a LoRA that does nothing, prompts that are wrong or swapped, or worth it.

Change of a prediction: ‖with the LoRA − bare model‖₂ over ‖bare model‖₂, on pictures that the bare model draws of the
prompt. MORE was chosen by benchmarks/verdicts.py on its first block alone, on LoRAs whose layers read the prompt, and
is measured with their words on the others. What is judged without words (MORE_UNHEARD, and swapped prompts by passes)
was chosen and measured on these same LoRAs with their words left out: never on a network whose LoRAs have none, as Flux
and SD 3. How often ENOUGH is right is not measured: no pair that was looked at is under it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .prompts import PromptEffect
from .solver import EMPTY, OTHER, OWN
from .words import WordEffect, swapped

IDLE = 0.01  # a smaller change of predictions is none
MORE = 1.65  # the least change with the prompt, in parts of that without, of a LoRA whose words do not speak to it
MORE_UNHEARD = 1.23  # the same where no layer of the LoRA reads the prompt by itself
ENOUGH = 0.5  # of what a LoRA does, the largest part that stacking may spoil before zipping is worth it: a choice


@dataclass(frozen=True)
class Effect:
    """What one LoRA does before it is zipped.

    change: under its own prompt, an empty one, and of two LoRAs the other's (OWN, EMPTY, OTHER). spoiled: how far
    stacking draws from the LoRA alone, in parts of how far the bare model does; 0 for one LoRA. words: None where it
    changes no layer that reads the prompt by itself, or none that hears it.
    """

    change: Mapping[str, float]
    spoiled: float = 0.0
    words: WordEffect | None = None

    @property
    def finite(self) -> bool:
        """Whether every change, and what stacking spoils, is a number."""
        return all(map(math.isfinite, [*self.change.values(), self.spoiled]))

    @property
    def idle(self) -> bool:
        """Whether it does nothing under its own prompt."""
        return self.change[OWN] < IDLE

    @property
    def silent(self) -> bool:
        """Whether it does nothing under any prompt, to the last digit: a strength of 0, or a file of zeros."""
        return not any(self.change.values())

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
    """What is found of LoRAs that are about to be zipped. idle, silent, asleep, unheard, spoiled: concepts.

    silent: those of the idle ones that no prompt can wake. unheard: whose prompt seems to be right by passes alone, as
    no layer reads it by itself. spoiled: those that stacking spoils too much. shared: whether two of the LoRAs change
    one layer, so that there is something to settle between them.
    """

    idle: tuple[str, ...] = ()
    swapped: bool = False
    asleep: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    unheard: tuple[str, ...] = ()
    spoiled: tuple[str, ...] = ()
    shared: bool = True

    @property
    def good(self) -> bool:
        """Whether nothing is found wrong with LoRAs and prompts."""
        return not (self.idle or self.swapped or self.asleep)

    @property
    def enough(self) -> bool:
        """Whether a plain stack keeps every LoRA."""
        return not self.spoiled


def find(effects: Mapping[str, Effect], shared: bool = True) -> Finding:
    """By concept. What makes another figure worthless hides it: of an idle LoRA no prompt is judged, of swapped ones
    neither is. shared: as of a Finding."""
    idle = tuple(concept for concept, effect in effects.items() if effect.idle)
    turned = not idle and _swapped(effects)
    asleep = () if turned else tuple(c for c, effect in effects.items() if not effect.idle and not effect.woken)
    return Finding(
        idle,
        turned,
        asleep,
        silent=tuple(concept for concept in idle if effects[concept].silent),
        unheard=tuple(c for c, effect in effects.items() if effect.words is None and c not in (*idle, *asleep)),
        spoiled=tuple(c for c, effect in effects.items() if not effect.spoiled <= ENOUGH),
        shared=shared,
    )


def _swapped(effects: Mapping[str, Effect]) -> bool:
    heard = {concept: effect.words for concept, effect in effects.items() if effect.words is not None}
    if len(heard) == len(effects):
        return swapped(heard)
    return len(effects) == 2 and all(
        effect.change.get(OTHER, 0.0) > MORE_UNHEARD * effect.change[OWN] for effect in effects.values()
    )


def after_zip(prompts: Mapping[str, PromptEffect], words: Mapping[str, WordEffect]) -> Finding:
    """What figures on references, taken after a zip, say of its prompts: swapped, or asleep. By concept.

    words: of those LoRAs whose words are known; an awake one needs either. Swapped prompts are told by words where all
    are known, and by passes else; of them neither is said to be asleep.
    """
    if words.keys() == prompts.keys():
        turned = bool(prompts) and swapped(words)
    else:
        turned = bool(prompts) and all(effect.swapped for effect in prompts.values())
    speaking = {concept for concept, effect in words.items() if effect.speaks}
    asleep = () if turned else tuple(c for c, e in prompts.items() if not e.fires and c not in speaking)
    return Finding(swapped=turned, asleep=asleep)
