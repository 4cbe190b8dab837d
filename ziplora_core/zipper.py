"""From a set of LoRAs to its merge, by the solver that the settings name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from . import fusion, gradient, layerwise, routing, solver
from .branch import JoinedSet
from .lora_set import LoRASet
from .shares import SolvedLayer


def without_learning(loras: LoRASet, settings: solver.Settings) -> solver.Result | None:
    """The result where no reference is needed: for no steps, and for one LoRA alone. None for all else."""
    if settings.steps == 0:
        return solver.direct_merge(loras)
    return solver.direct_merge(loras, "one LoRA alone stays as it is") if len(loras.concepts) == 1 else None


def _drawing(loras: LoRASet) -> int:
    """How many of the LoRAs change anything: one whose text-encoder part alone is on does not."""
    return len({concept for layer in loras.layers.values() for concept, f in layer.items() if f.scale})


def solve(
    joined: JoinedSet,
    predictor: solver.Predictor,
    references: solver.References,
    settings: solver.Settings,
    on_step: Callable[[solver.Step], None] | None = None,
    on_layer: Callable[[SolvedLayer], None] | None = None,
) -> solver.Result:
    """Find the coefficients of every LoRA, how inputs of three and more are routed, or the downs of a fusion.

    No steps give the direct merge, and one LoRA itself, whatever the solver. `on_step` hears of each gradient step,
    `on_layer` of each layer that is solved in closed form; what they or the predictor raise ends the run. Raises
    FloatingPointError where what the LoRAs do in a layer is not finite, NotFinite where a loss is not.
    """
    unlearned = without_learning(joined.loras, settings)
    if unlearned is not None:
        return unlearned
    if settings.solver == "gradient":
        return gradient.optimize(joined, predictor, references, settings, on_step)
    relative_error: dict[str, float] = {}

    def solved(layer: SolvedLayer) -> None:
        relative_error[layer.name] = layer.relative_error
        if on_layer is not None:
            on_layer(layer)

    given = joined, predictor, references, settings.seed, solved
    if settings.solver == "fusion":
        downs, coefficients = fusion.merge(*given)
        how = "fused layer by layer, in closed form"
        return solver.Result(coefficients, stopped=how, relative_error=relative_error, routing=downs)
    if settings.solver == "layerwise" and _drawing(joined.loras) > 2:
        matrices, coefficients = routing.merge(*given, settings.ridge)
        how = "routed layer by layer, in closed form"
        return solver.Result(coefficients, stopped=how, relative_error=relative_error, routing=matrices)
    start = layerwise.merge(*given, settings.ridge)
    if settings.solver == "layerwise":
        return solver.Result(start, stopped="solved layer by layer, in closed form", relative_error=relative_error)
    learned = gradient.optimize(joined, predictor, references, settings, on_step, start)
    return replace(learned, relative_error=relative_error)
