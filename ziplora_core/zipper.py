"""The way from a pair to its coefficients, by the solver that the settings name."""

from __future__ import annotations

from collections.abc import Callable

from . import layerwise, solver
from .branch import JoinedPair


def close(
    joined: JoinedPair,
    predictor: solver.Predictor,
    references: solver.References,
    settings: solver.Settings,
    on_step: Callable[[solver.Step], None] | None = None,
    on_layer: Callable[[int, int], None] | None = None,
) -> solver.Result:
    """Find m_c and m_s. No steps give the direct merge, whatever the solver.

    `on_step` hears of each gradient step, `on_layer(done, total)` of each layer that is solved in closed form; what
    they or the predictor raise ends the run. Raises FloatingPointError when a loss is not finite.
    """
    if settings.steps == 0:
        return solver.direct_merge(joined.pair)
    if settings.solver == "gradient":
        return solver.optimise(joined, predictor, references, settings, on_step)
    alone = settings.solver == "layerwise"
    ridge = layerwise.RIDGE if alone else layerwise.START_RIDGE
    start = layerwise.merge(joined, predictor, references, settings.seed, on_layer, ridge)
    if alone:
        return solver.Result(start, stopped="solved layer by layer, in closed form")
    return solver.optimise(joined, predictor, references, settings, on_step, start)
