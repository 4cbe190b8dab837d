"""A zipped pair, as it travels on the graph's sockets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ....ziplora_core.coefficients import Coefficients
from .fitting import FittedPair
from .loras import LoRASources

ZIPPED = "zipped"


@dataclass(frozen=True)
class ZippedLoRA:
    """What travels on a ZIPPED_LORA socket: the pair, its coefficients, and the dials already turned.

    method, settings: how it came about, for the file that it may be saved to.
    """

    sources: LoRASources
    fitted: FittedPair = field(repr=False)
    coefficients: Coefficients = field(repr=False)
    content_strength: float = 1.0
    style_strength: float = 1.0
    report: str = ""
    method: str = ZIPPED
    settings: dict[str, Any] = field(default_factory=dict)

    def strength(self, concept: str) -> float:
        """Of what is not zipped but follows its LoRA: the file's strength times the dial."""
        dial = {"content": self.content_strength, "style": self.style_strength}[concept]
        return self.sources.by_concept()[concept].strength * dial
