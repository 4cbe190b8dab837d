"""Faults in nodes/bridge and in the nodes."""

from __future__ import annotations

from . import (
    Mutant,
    bridge_drawn,
    bridge_files,
    bridge_host,
    bridge_nodes,
    bridge_pairs,
    bridge_plan,
    bridge_remembered,
    bridge_rivals,
    bridge_training,
)

MUTANTS: list[Mutant] = [
    *bridge_pairs.MUTANTS,
    *bridge_files.MUTANTS,
    *bridge_plan.MUTANTS,
    *bridge_host.MUTANTS,
    *bridge_drawn.MUTANTS,
    *bridge_training.MUTANTS,
    *bridge_nodes.MUTANTS,
    *bridge_remembered.MUTANTS,
    *bridge_rivals.MUTANTS,
]
