"""What came of an optimization, as figures: what was found, what was measured of it, and who is kept how well."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ....ziplora_core import checkup
from ....ziplora_core.coefficients import Coefficients
from ....ziplora_core.prompts import PromptEffect
from ....ziplora_core.solver import Result, Settings
from ....ziplora_core.words import WordEffect
from ..drawing.recipes import Recipe
from ..drawing.sampling import GeneratedReferences
from ..lora.fitting import FittedSet
from ..lora.loras import LoRASources
from ..memory.plan import Plan

DIALS = (1.2, 1.4)  # strengths that are tried for the LoRA that is kept much worse than the others
_MUCH = 0.2  # by so much of the direct merge's loss


@dataclass(frozen=True)
class Tried:
    """A dial that was measured: a concept, its strength, and the retention of every concept with it."""

    concept: str
    strength: float
    retention: Mapping[str, float]


@dataclass(frozen=True)
class Outcome:
    """Everything a report tells. retention and alignment: [direct merge, zipped]. drawn, prompts, words: by concept.

    tried: dials that were measured of what was found. again: memory ran out, and this is the second run. recipe: how
    the model draws.
    """

    sources: LoRASources
    fitted: FittedSet
    settings: Settings
    before: Coefficients
    result: Result = field(default_factory=lambda: Result(Coefficients({})))
    seconds: float = 0.0
    retention: list[dict[str, float]] = field(default_factory=list)
    alignment: list[dict[str, float]] = field(default_factory=list)
    drawn: dict[str, GeneratedReferences] = field(default_factory=dict)
    prompts: dict[str, PromptEffect] = field(default_factory=dict)
    words: Mapping[str, WordEffect] = field(default_factory=dict)
    tried: list[Tried] = field(default_factory=list)
    plan: Plan = field(default_factory=Plan)
    recipe: Recipe | None = None
    again: bool = False

    @property
    def loss_map(self) -> dict[str, list[float]]:
        """Each step's loss and its terms; without steps, as "loss" and "left", what is left of each layer's error."""
        steps = [step.losses for step in self.result.history]
        if not steps:
            left = list(self.result.relative_error.values())
            return {"loss": left, "left": left} if left else {"loss": []}
        weight = self.settings.similarity_lambda
        return {
            "loss": [losses.total for losses in steps],
            **{c: [losses.retention[c] for losses in steps] for c in self.sources.by_concept},
            "overlap": [weight * losses.overlap for losses in steps],
        }

    @property
    def fused(self) -> bool:
        """Whether it is Mix-of-Show's fusion."""
        return self.settings.solver == "fusion" and bool(self.result.routing)

    @property
    def shared(self) -> bool:
        """Whether two of the LoRAs change one layer, so that there is something to settle between them."""
        return any(True for _ in self.fitted.loras.common_layers())

    @property
    def finite(self) -> bool:
        """Whether every retention is a number."""
        return all(math.isfinite(loss) for losses in self.retention for loss in losses.values())

    @property
    def asleep(self) -> list[str]:
        """Concepts whose own prompt does not wake their LoRA, whatever its words are; none of swapped prompts."""
        return list(checkup.after_zip(self.prompts, self.words).asleep)

    @property
    def swapped(self) -> bool:
        """Whether each of two LoRAs is woken by the other's prompt. Its words tell it best, where they are known."""
        return checkup.after_zip(self.prompts, self.words).swapped

    def left(self, retention: Mapping[str, float]) -> dict[str, float]:
        """By concept, a retention in parts of the direct merge's: 0 where nothing is lost, 1 where as much is."""
        return {concept: share_left(loss, retention[concept]) for concept, loss in self.retention[0].items()}

    @property
    def dials_to_try(self) -> list[tuple[str, float]]:
        """(concept, strength) of dials that are worth a measurement: of the LoRA that is kept much worse than the
        others, where the figures can be trusted."""
        if not (self.retention and self.finite) or self.swapped or self.asleep or not self.shared:
            return []
        left = self.left(self.retention[1])
        worst = max(left, key=left.__getitem__)
        others = [share for concept, share in left.items() if concept != worst]
        if not others or not left[worst] - sum(others) / len(others) >= _MUCH:
            return []
        return [(worst, strength) for strength in DIALS]


def share_left(before: float, after: float) -> float:
    """after / before; 1 where neither loses anything, infinite where only the first does not."""
    if before > 0:
        return after / before
    return 1.0 if after <= 0 else math.inf
