"""Ways to merge two LoRAs, for the table: each takes a Case and returns a Merge."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.objectives import mean_square, summed_mean_products
from benchmarks.quality_table import ORACLE
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
    oracle: Any = None  # the grid's best, chosen by pictures and the truth
    composed: Any = None  # pictures of the composed prompt, and moments of what layers see of them under it

    @staticmethod
    def grid(pair) -> list:
        """The direct merges that a patient user tries."""
        ones = Coefficients.ones(pair)
        return [ones.scaled(content=c, style=s) for c, s in itertools.product(GRID, GRID)]

    @property
    def ones(self):
        return Coefficients.ones(self.joined.loras)

    def retention(self, merges: Sequence[Merge], references: Any) -> list[dict[str, float]]:
        """On noise that no method is trained on and none is chosen by."""
        found: dict[int, dict[str, float]] = {}
        for fitted in {id(m.fitted): m.fitted for m in merges}.values():
            mine = [i for i, m in enumerate(merges) if m.fitted is fitted]
            joined = self.joined
            if fitted is not self.fitted:
                joined = core.branch.JoinedSet(fitted.loras, joined.device, joined.dtype)
            candidates = [merges[i].coefficients for i in mine]
            losses = core.retention.measure_retention(
                self.joined, self.predictor, references, candidates, self.seed + 77, draws=8, merged=joined
            )
            found |= dict(zip(mine, losses, strict=True))
        return [found[i] for i in range(len(merges))]


@dataclass
class Merge:
    """What a method found: coefficients on a fitted pair, its seconds, other coefficients for each sampling step."""

    fitted: Any
    coefficients: Any
    seconds: float = 0.0
    by_step: Sequence[Any] | None = None

    @property
    def moved(self) -> float:
        """How far the coefficient that moved most is from one."""
        found = [m for side in self.coefficients.by_concept.values() for m in side.values()]
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
    grid = case.grid(case.joined.loras)
    found = core.retention.measure_retention(
        case.joined, case.predictor, case.references, [case.ones, *grid], case.seed
    )
    whole = found[0]
    cost = [sum(f[c] / max(whole[c], 1e-9) for c in whole) for f in found[1:]]
    return grid[cost.index(min(cost))]


def direct(name: str) -> Method:
    """A method of Direct Merge LoRA."""

    def run(case: Case) -> Merge:
        began = time.monotonic()
        pair, coefficients = core.direct.METHODS[name](case.fitted.loras)
        return Merge(replace(case.fitted, loras=pair), coefficients, time.monotonic() - began)

    return run


def node(**settings: Any) -> Method:
    """What ZipLoRAOptimize does with these settings, the others as shipped."""

    def run(case: Case) -> Merge:
        began = time.monotonic()
        chosen = Settings(seed=case.seed, **settings)
        result = core.zipper.solve(case.joined, case.predictor, case.references, chosen)
        loras = core.routing.routed(case.fitted.loras, result.routing)
        return Merge(replace(case.fitted, loras=loras), result.coefficients, time.monotonic() - began)

    return run


# The public training script's: squared errors, and a mean product for each layer. Its README's rate is 5e-5.
COMMUNITY = core.objective.Objective("community", mean_square, summed_mean_products, relative=False)

PAPER_STEPS = {"solver": "gradient", "steps": 100, "learning_rate": 0.01}


def objective(name: str, **changed: Any) -> Any:
    return replace(core.objective.BALANCED, name=name, **changed)


def bounded(method: Method) -> Method:
    """What a method finds, with every coefficient brought into [0, 1]."""

    def run(case: Case) -> Merge:
        found = method(case)
        sides = {c: {k: m.clamp(0, 1) for k, m in s.items()} for c, s in found.coefficients.by_concept.items()}
        return replace(found, coefficients=Coefficients(sides))

    return run


def weighted_overlap(case: Case):
    """100 steps from ones; a column's overlap counts by how aligned and how heavy its two updates are."""
    weights = []
    for layer in case.joined.loras.layers.values():
        if len(layer) == 2:
            deltas = (f.scale * f.up.float() @ f.down.float() for f in layer.values())
            both = math.prod(deltas).sum(0).abs()  # of each column: both lengths times the cosine
            weights.append(both / both.mean().clamp_min(1e-30))
    each = torch.cat(weights)

    def overlap(content, style, sizes):
        return 100 * (each.to(content) * content * style).abs().mean()

    return core.zipper.solve(
        case.joined,
        case.predictor,
        case.references,
        Settings(seed=case.seed, objective=objective("weighted overlap", overlap=overlap), **PAPER_STEPS),
    ).coefficients


def late_overlap(case: Case):
    """100 steps from ones, of which the first half knows no overlap and the second twice as much."""
    whole = {**PAPER_STEPS, "steps": 50, "seed": case.seed}
    given = case.joined, case.predictor, case.references
    half = core.gradient.optimize(*given, Settings(**whole, similarity_lambda=0.0)).coefficients
    return core.gradient.optimize(*given, Settings(**whole, similarity_lambda=0.02), start=half).coefficients


FAR = node(ridge=0.1, steps=25, learning_rate=0.03)  # the lowest retention losses

BY_LAYER = ("TIES", "DARE", "KnOTS", "TSV-Merge")  # rows of these names are `rivals.py`'s, of matrices alone

# In the table's order. "default" is the node as shipped.
METHODS: dict[str, Method] = {
    "base model": timed(lambda case: case.ones.scaled(content=0.0, style=0.0)),
    "content LoRA": timed(lambda case: case.ones.scaled(style=0.0)),
    "style LoRA": timed(lambda case: case.ones.scaled(content=0.0)),
    "direct 1/1": timed(lambda case: case.ones),
    "direct, best by retention": timed(best_of_grid),
    ORACLE: timed(lambda case: case.oracle),
    "community settings": node(**{**PAPER_STEPS, "learning_rate": 5e-5}, objective=COMMUNITY),
    "direct .8/.8": timed(lambda case: case.ones.scaled(content=0.8, style=0.8)),
    "direct .6/.8": timed(lambda case: case.ones.scaled(content=0.6, style=0.8)),
    **{
        f"{name}, as shipped" if name in BY_LAYER else name: direct(name)
        for name, m in core.direct.METHODS.items()
        if name != "sum" and not m.sdxl_alone
    },
    "Eq. 3 to the letter": node(**PAPER_STEPS, objective=core.objective.PAPER),
    "100 steps from ones": node(**PAPER_STEPS),
    "start and 25 steps": FAR,
    "layer-wise alone": node(solver="layerwise"),
    "default": node(),
}

# What was tried on the way to the default (docs/ablation.md).
ABLATION: dict[str, Method] = {
    "base model": METHODS["base model"],
    "direct 1/1": METHODS["direct 1/1"],
    "100 steps from ones": METHODS["100 steps from ones"],
    "  lambda 0": node(**PAPER_STEPS, similarity_lambda=0.0),
    "  lambda 0.03": node(**PAPER_STEPS, similarity_lambda=0.03),
    "  lambda from 0 to 0.02 half-way": timed(late_overlap),
    "  overlap weighted by alignment and size": timed(weighted_overlap),
    "  squared retention": node(**PAPER_STEPS, objective=objective("squared", retention=mean_square)),
    "  coefficients in [0, 1]": bounded(node(**PAPER_STEPS)),
    "  rate 0.03": node(**{**PAPER_STEPS, "learning_rate": 0.03}),
    "  25 steps, rate 0.03": node(**{**PAPER_STEPS, "learning_rate": 0.03, "steps": 25}),
    "Eq. 3 to the letter": METHODS["Eq. 3 to the letter"],
    "layer-wise alone, ridge 1": METHODS["layer-wise alone"],
    "  ridge 0.1": node(solver="layerwise", ridge=0.1),
    "  ridge 3": node(solver="layerwise", ridge=3.0),
    "start (ridge 1) and 10 steps: the default": METHODS["default"],
    "  lambda 0, from the start": node(similarity_lambda=0.0),
    "  25 steps": node(steps=25),
    "  100 steps": node(steps=100),
    "start (ridge 0.1) and 25 steps, rate 0.03": FAR,
}
