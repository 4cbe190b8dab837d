"""Faults in the memory plan."""

from __future__ import annotations

from . import faults

PLAN = ("tests/inhost/test_contracts_plan.py",)

MUTANTS = [
    *faults(
        "nodes/bridge/memory/plan.py",
        PLAN,
        ("the factors are left out", "fixed = factors * dtype.itemsize + _VECTORS", "fixed = _VECTORS"),
        ("the coefficients are left out", " + _VECTORS * 4 * loras.coefficient_count", ""),
        ("forward passes are left out", "before = fixed + concepts * workspace", "before = fixed"),
        ("a step's own workspace is left out", "passes * (_BACKWARD * workspace + rows", "passes * (rows"),
        (
            "the gradients of a block are left out",
            "rows * (rehearsed.kept(recomputed) + rehearsed.largest))",
            "rows * rehearsed.kept(recomputed))",
        ),
        (
            "one noisy copy stands for all",
            "workspace + rows * (rehearsed.kept(recomputed) + rehearsed.largest))",
            "workspace + (rehearsed.kept(recomputed) + rehearsed.largest))",
        ),
        ("the whole room is spent", "spend = int(_USED * room)", "spend = room"),
        (
            "the smaller reference is planned for",
            "max(latents.values(), key=lambda samples",
            "min(latents.values(), key=lambda samples",
        ),
        ("the weights' own room is not kept free", "free - model.model_size() - ", "free - "),
        ("the host's reserve is spent", " - management.extra_reserved_memory()", ""),
        ("numbers that are trained are left out", "fixed = _TRAINED * numbers", "fixed = 0"),
        (
            "training: a step's own workspace is left out",
            "need = fixed + _BACKWARD * workspace + rows",
            "need = fixed + rows",
        ),
    ),
    *faults(
        "nodes/bridge/memory/rehearsal.py",
        PLAN,
        (
            "the block that is run again is left out",
            "sum(self.inside[recomputed:]) + again",
            "sum(self.inside[recomputed:])",
        ),
    ),
]
