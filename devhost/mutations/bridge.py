"""Faults in nodes/bridge."""

from __future__ import annotations

from . import Mutant

MUTANTS: list[Mutant] = []
