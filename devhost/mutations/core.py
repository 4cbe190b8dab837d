"""Faults in ziplora_core."""

from __future__ import annotations

from . import Mutant

MERGE = ("tests/core/test_merge.py",)

MUTANTS: list[Mutant] = [
    Mutant(
        "merge: up without its scale",
        "ziplora_core/merge.py",
        "up[:, part].mul_(factors.scale)",
        "up[:, part].mul_(1.0)",
        MERGE,
    ),
]
