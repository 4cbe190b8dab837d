"""Ways to merge two LoRAs, for the table: each takes a Case and returns a Merge."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.studio import core

Coefficients = core.coefficients.Coefficients
Settings = core.solver.Settings
GRID = (0.4, 0.6, 0.8, 1.0)  # strengths that a patient user tries for each LoRA


@dataclass
class Case:
    """A pair on a loaded model, and the seed of everything random."""

    fitted: Any
    joined: Any
    predictor: Any
    references: Any
    seed: int

    @property
    def ones(self):
        return Coefficients.ones(self.joined.pair)

    def retention(self, merges: Sequence[Merge], references: Any) -> list[dict[str, float]]:
        """On noise that no method is trained on and none is chosen by."""
        found: dict[int, dict[str, float]] = {}
        for fitted in {id(m.fitted): m.fitted for m in merges}.values():
            mine = [i for i, m in enumerate(merges) if m.fitted is fitted]
            joined = self.joined
            if fitted is not self.fitted:
                joined = core.branch.JoinedPair(fitted.pair, joined.device, joined.dtype)
            candidates = [merges[i].coefficients for i in mine]
            losses = core.solver.measure_retention(
                self.joined, self.predictor, references, candidates, self.seed + 77, draws=8, merged=joined
            )
            found |= dict(zip(mine, losses, strict=True))
        return [found[i] for i in range(len(merges))]


@dataclass
class Merge:
    """What a method found: coefficients on a fitted pair, and how long it took."""

    fitted: Any
    coefficients: Any
    seconds: float = 0.0

    @property
    def moved(self) -> float:
        """How far the coefficient that moved most is from one."""
        found = [m for side in (self.coefficients.content, self.coefficients.style) for m in side.values()]
        return max(float((m - 1).abs().max()) for m in found)


Method = Callable[[Case], Merge]


def timed(method: Callable[[Case], Any]) -> Method:
    """A method that only chooses coefficients."""

    def run(case: Case) -> Merge:
        began = time.monotonic()
        coefficients = method(case)
        return Merge(case.fitted, coefficients, time.monotonic() - began)

    return run


def best_of_grid(case: Case):
    """The strengths whose direct merge has the lowest retention loss, each concept's by its own size at 1/1."""
    grid = [case.ones.scaled(c, s) for c, s in itertools.product(GRID, GRID)]
    found = core.solver.measure_retention(case.joined, case.predictor, case.references, [case.ones, *grid], case.seed)
    whole = found[0]
    cost = [sum(f[c] / max(whole[c], 1e-9) for c in whole) for f in found[1:]]
    return grid[cost.index(min(cost))]


def np_lora(case: Case) -> Merge:
    """NP-LoRA with mu 0.5."""
    began = time.monotonic()
    pair = core.direct.np_lora(case.fitted.pair)
    return Merge(replace(case.fitted, pair=pair), Coefficients.ones(pair), time.monotonic() - began)


def node(**settings: Any) -> Method:
    """What ZipLoRAOptimize does with these settings, the others as shipped."""

    def run(case: Case):
        chosen = Settings(seed=case.seed, **settings)
        return core.zipper.close(case.joined, case.predictor, case.references, chosen).coefficients

    return timed(run)


# The public training script's: squared errors, and a mean product for each layer. Its README's rate is 5e-5.
COMMUNITY = core.objective.Objective(
    "community", core.objective.mean_square, core.objective.summed_mean_products, relative=False
)

PAPER_STEPS = {"solver": "gradient", "steps": 100, "learning_rate": 0.01}

# In the table's order. "default" is the node as shipped.
METHODS: dict[str, Method] = {
    "base model": timed(lambda case: case.ones.scaled(0.0, 0.0)),
    "content LoRA": timed(lambda case: case.ones.scaled(style=0.0)),
    "style LoRA": timed(lambda case: case.ones.scaled(content=0.0)),
    "direct 1/1": timed(lambda case: case.ones),
    "direct, best of grid": timed(best_of_grid),
    "community settings": node(**{**PAPER_STEPS, "learning_rate": 5e-5}, objective=COMMUNITY),
    "NP-LoRA": np_lora,
    "Eq. 3 to the letter": node(**PAPER_STEPS, objective=core.objective.PAPER),
    "100 steps from ones": node(**PAPER_STEPS),
    "layerwise": node(solver="layerwise"),
    "default": node(),
}
