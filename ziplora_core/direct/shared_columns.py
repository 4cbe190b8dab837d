"""Shared columns: the closed form of the weights alone (`ziplora_core/shares.py`)."""

from __future__ import annotations

from .. import shares
from .method import Method

METHOD = Method(
    "shared columns",
    "where both LoRAs are strong they share the place by size, what is weak stays",
    lambda loras: (loras, shares.merge(loras)),
    settings={"ridge": shares.RIDGE},
    called="Direct merge (shared columns)",
)
