"""Faults in ziplora_core."""

from __future__ import annotations

from . import Mutant, core_algebra, core_files, core_rivals, core_solvers, core_training

MUTANTS: list[Mutant] = [
    *core_algebra.MUTANTS,
    *core_solvers.MUTANTS,
    *core_training.MUTANTS,
    *core_files.MUTANTS,
    *core_rivals.MUTANTS,
]
