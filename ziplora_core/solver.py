"""What every solver is given and what it answers: settings, references, predictor, losses, result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from torch import Tensor

from .branch import Branch
from .checks import SEED, Range, check_ranges, one_of
from .coefficients import Coefficients
from .lora_set import LoRASet
from .objective import BALANCED, Objective
from .shares import RIDGE

SOLVERS = ("layerwise", "layerwise, then gradient", "gradient", "fusion")
OWN, EMPTY, OTHER = "own", "empty", "other"  # prompts of a row: its concept's, none, of two the other concept's


@dataclass(frozen=True)
class Settings:
    """Raises ValueError for a value out of range, naming it. ranges: of each number, for the node's schema too.

    solver: "layerwise" in closed form, by columns for two LoRAs and by routing for more, which takes no steps (but 0
    give the direct merge, whatever the solver);
    "gradient" from all ones, as the paper, which takes 100 at 0.01; or the first as the second's start; "fusion", as
    Mix-of-Show's, which takes no steps either.
    ridge: pull of the layer-wise solve towards the direct merge, in parts of each layer's mean diagonal (`shares`).
    """

    steps: int = 10
    learning_rate: float = 0.01
    similarity_lambda: float = 0.01
    batch_size: int = 1
    seed: int = 0
    objective: Objective = BALANCED
    solver: str = SOLVERS[0]
    ridge: float = RIDGE

    ranges: ClassVar[Mapping[str, Range]] = {
        "steps": Range(0, 10_000),
        "learning_rate": Range(1e-8, 10.0),
        "similarity_lambda": Range(0.0, 1000.0),
        "batch_size": Range(1, 64),
        "ridge": Range(1e-6, 1e6),
        "seed": SEED,
    }

    def __post_init__(self) -> None:
        check_ranges(self, self.ranges)
        one_of("solver", self.solver, SOLVERS)

    @property
    def gradient_steps(self) -> int:
        """Steps that the solver will take."""
        return 0 if self.solver in ("layerwise", "fusion") else self.steps


References = Mapping[str, Tensor]  # concept -> clean latents (N, C, *space) in the model's own space; the set's order


@dataclass(frozen=True)
class Batch:
    """Rows of one forward pass. The predictor noises them with its own schedule.

    latents, noise: (rows, C, *space) float32. timesteps: (rows,) int64 in [0, predictor.timesteps).
    concept_index: (rows,) int64, ascending: index, among the set's concepts, of the one whose reference and prompt a
    row has. prompt: which one all rows are seen with, OWN but where prompts are compared.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    concept_index: Tensor
    prompt: str = OWN


class Predictor(Protocol):
    """A frozen network that draws with a branch added to its layers.

    timesteps: number of training timesteps. joins: whether rows of different concepts may share a pass.
    loss_scale: factor on the loss before backward (1 except where half precision would underflow).
    Calling it returns the raw prediction (rows, C, *space), float32 or wider, differentiable in the branch. `target`
    gives the raw prediction that would find a batch's own clean latents.
    """

    timesteps: int
    joins: bool
    loss_scale: float

    def __call__(self, batch: Batch, branch: Branch) -> Tensor: ...

    def target(self, batch: Batch) -> Tensor: ...


@dataclass(frozen=True)
class Losses:
    """The terms of the objective: retention of each concept, overlap (not yet times λ), and their weighted sum."""

    retention: Mapping[str, float]
    overlap: float
    total: float


@dataclass(frozen=True)
class Step:
    """Losses of one step, before its update. `index` counts from 1."""

    index: int
    steps: int
    losses: Losses


@dataclass(frozen=True)
class Result:
    """Coefficients, the losses of each step, why they ended.

    relative_error: layer -> its error as a share of the direct merge's, of the layer-wise solve; empty without it.
    routing: layer -> (R, R), where the rank axis was mixed instead, or (R, in, kernel), where downs were made anew;
    then all coefficients are one (`routing`, `fusion`).
    """

    coefficients: Coefficients
    history: list[Step] = field(default_factory=list)
    stopped: str = "all steps done"
    relative_error: dict[str, float] = field(default_factory=dict)
    routing: Mapping[str, Tensor] = field(default_factory=dict)


class NotFinite(FloatingPointError):
    """A run that ended because a number was not finite.

    step: at which. layer: whose coefficients had changed most since the start; empty where none had. kept: the steps
    before, with the coefficients of the last one whose loss was finite; None where there was none.
    """

    def __init__(self, what: str, step: int, start: Coefficients, now: Coefficients, kept: Result | None):
        concept, self.layer, by = now.most_changed(start)
        self.step, self.kept = step, kept
        changed = "no coefficient had changed yet"
        if self.layer:
            changed = f"the {concept} coefficients of layer '{self.layer}' had changed most, by {by:.3g}"
        super().__init__(f"step {step}: {what}; {changed}; lower learning_rate or load the model in bf16 or fp32")


def direct_merge(loras: LoRASet, why: str = "no steps asked for: the direct merge") -> Result:
    """What no steps give, and one LoRA alone: all ones."""
    return Result(Coefficients.ones(loras), stopped=why)
