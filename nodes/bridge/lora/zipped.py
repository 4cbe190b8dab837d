"""Zipped LoRAs, as they travel on the graph's sockets."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ....ziplora_core.coefficients import Coefficients
from .fitting import FittedSet
from .loras import LoRASources

ZIPPED = "zipped"


@dataclass(frozen=True)
class ZippedLoRA:
    """What travels on a ZIPPED_LORA socket: the LoRAs, their coefficients, and the dials already turned.

    dials: concept -> strength that is in the coefficients already, 1 where none is said. method, settings: how it came
    about, for the file that it may be saved to.
    """

    sources: LoRASources
    fitted: FittedSet = field(repr=False)
    coefficients: Coefficients = field(repr=False)
    dials: dict[str, float] = field(default_factory=dict)
    report: str = ""
    method: str = ZIPPED
    settings: dict[str, Any] = field(default_factory=dict)

    def dial(self, concept: str) -> float:
        return self.dials.get(concept, 1.0)

    def dialled(self, strengths: dict[str, float]) -> ZippedLoRA:
        """The same with dials turned, by concept: times so much of what they are. Costs nothing.

        Raises ValueError for a concept that is not there.
        """
        coefficients = self.coefficients.scaled(**strengths)
        dials = {concept: self.dial(concept) * strengths.get(concept, 1.0) for concept in self.sources.by_concept}
        return replace(self, coefficients=coefficients, dials=dials)

    def strength(self, concept: str) -> float:
        """Of what is not zipped but follows its LoRA: the file's strength times the dial."""
        return self.sources[concept].strength * self.dial(concept)
