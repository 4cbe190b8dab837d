"""What reports say of the LoRAs themselves, and how a report is laid out: what users ask first, then its details."""

from __future__ import annotations

from collections.abc import Iterable

from . import text_encoders
from .fitting import FittedSet
from .loras import LoRASources

DETAILS = "details"  # the line of a report above which no word of the paper stands
ALONE = "One LoRA alone: it comes out as it is, there is nothing to merge it with."


def report(said: Iterable[str], details: Iterable[str]) -> str:
    """Lines of plain text; a line break in Markdown too, which Preview as Text renders."""
    return "  \n".join([*said, DETAILS, *details])


def lines(sources: LoRASources, fitted: FittedSet) -> list[str]:
    """Each file with its ranks, then what they change of the model."""
    loras = fitted.loras
    counts = {kind: n for kind, n in loras.layer_counts().items() if n} if len(loras.concepts) > 1 else {}
    layers = ", ".join(f"{n} {kind}" for kind, n in counts.items()) or str(len(loras.layers))
    return [*files(sources, fitted), f"layers: {layers}; {loras.coefficient_count:,} coefficients"]


def files(sources: LoRASources, fitted: FittedSet) -> list[str]:
    """Each file with its ranks."""
    return [f"{c}: {source.title} ({_ranks(*fitted.loras.ranks(c))})" for c, source in sources.by_concept.items()]


def notes(sources: LoRASources, fitted: FittedSet, zipped: bool) -> list[str]:
    """What a user should know about the files. zipped: whether prompts were looked at."""
    return [f"note: {note}" for note in [*fitted.notes, *text_encoders.notes(sources, zipped)]]


def _ranks(low: int, high: int) -> str:
    return f"rank {low}" if low == high else f"ranks {low} to {high}"
