"""Training LoRAs from pictures: DreamBooth's objective (arXiv 2208.12242) on low-rank factors, as ZipLoRA's LoRAs are.

The network is frozen (`frozen.py`); what is trained are a LoRA's `down` and `up` and nothing else. One step is one
forward and one backward pass over the rows that fit into one batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from .checks import SEED, Range, check_ranges
from .draws import GOLDEN
from .frozen import Base
from .gradient import MAX_SKIPPED

_LARGEST_NORM = 1.0  # of the gradient, above which it is scaled down, as the diffusers DreamBooth scripts do


@dataclass(frozen=True)
class Settings:
    """Raises ValueError for a value out of range, naming it. The defaults are the paper's (ZipLoRA, Sec. 4).

    batch_size: rows a step, of pictures; with class pictures as many again. prior_weight: of their loss. ranges: of
    each number, for the nodes' schemas too.
    """

    steps: int = 1000
    learning_rate: float = 5e-5
    rank: int = 64
    batch_size: int = 1
    seed: int = 0
    prior_weight: float = 1.0

    ranges: ClassVar[Mapping[str, Range]] = {
        "steps": Range(1, 100_000),
        "learning_rate": Range(1e-8, 1.0),
        "rank": Range(1, 1024),
        "batch_size": Range(1, 64),
        "seed": SEED,
        "prior_weight": Range(0.0, 100.0),
    }

    def __post_init__(self) -> None:
        check_ranges(self, self.ranges)

    def timestep(self, fraction: float, timesteps: int) -> int:
        """One of so many timesteps, for a number that is evenly spread over [0, 1): here they are spread evenly."""
        return int(fraction * timesteps)


@dataclass(frozen=True)
class Example:
    """latents: one picture (1, C, *space) in the model's own space. prompt: which of the denoiser's."""

    latents: Tensor
    prompt: int


@dataclass(frozen=True)
class Pictures:
    """What is learned from. sets: one for each concept (two for joint training), drawn from in turn.

    priors: class pictures, for prior preservation; empty for none. scored: whose prompt a probe must see
    (`Trainable.before`), where it matters.
    """

    sets: Sequence[Sequence[Example]]
    priors: Sequence[Example] = ()
    scored: Example | None = None


@dataclass(frozen=True)
class Rows:
    """One forward pass. latents, noise: (rows, C, *space) float32. timesteps: (rows,). prompts: one for each row.

    weights: (rows,), of each row's mean squared error in the loss.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    prompts: tuple[int, ...]
    weights: Tensor


class Adapted(Protocol):
    """What is added to a layer: the output of layer `name` for x, by its frozen base and what is trained."""

    def layer(self, name: str, x: Tensor, base: Base, **convolution: Any) -> Tensor: ...


class Denoiser(Protocol):
    """A frozen network. timesteps, loss_scale: as a Predictor's.

    Calling it returns (prediction, target), both (rows, C, *space): the raw prediction, differentiable in what the
    adapted branch trains, and what it should have been. kind: rows of one kind may share a pass.
    """

    timesteps: int
    loss_scale: float

    def __call__(self, rows: Rows, branch: Adapted) -> tuple[Tensor, Tensor]: ...

    def kind(self, prompt: int) -> Hashable: ...


class GradientNotFinite(FloatingPointError):
    """At the loss scale as it is: a smaller one may help."""


class Trainable(Protocol):
    """What `train` trains."""

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Adam's parameter groups."""

    def branch(self, rows: Rows | None) -> Adapted:
        """For a pass of training; for None, as the LoRA is used afterwards."""

    def tensors(self) -> list[Tensor]:
        """Everything that a run changes, always in the same order."""

    def penalty(self) -> Tensor | None:
        """Added to the loss."""

    def largest(self) -> str | None:
        """The layer whose update is largest (‖up‖·‖down‖, not finite before all others); None where all are zero."""

    def before(self, step: int, probe: Callable[[], None]) -> None:
        """Called before a step (from 0), again where it raises GradientNotFinite. probe: adds the gradient of one
        batch's loss, without the penalty."""


class Plain:
    """Of a `Trainable`: all at one rate, without a penalty, and with nothing to do before a step."""

    def tensors(self) -> list[Tensor]:
        raise NotImplementedError

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        return [{"params": self.tensors(), "lr": learning_rate}]

    def penalty(self) -> None:
        return None

    def before(self, step: int, probe: Callable[[], None]) -> None:
        pass


@dataclass(frozen=True)
class Step:
    """After an update: its number (from 1), how many there will be, and its loss without and with the penalty."""

    index: int
    steps: int
    loss: float
    penalty: float = 0.0


def step_rows(pictures: Pictures, denoiser: Denoiser, settings: Settings, step: int) -> list[Rows]:
    """The passes of one step, from its number alone, so that a run can go on where another stopped.

    Pictures are drawn at random, sets in turn, timesteps spread over the schedule as the settings have it. Rows of one
    size and kind share a pass. Class pictures get noise and timesteps of their own; each loss is a mean over its rows.
    """
    generator = torch.Generator().manual_seed((settings.seed * 1_000_003 + step) % 2**63)
    start = float(torch.rand((), generator=torch.Generator().manual_seed(settings.seed % 2**63), dtype=torch.float64))
    drawn: list[tuple[Example, float]] = []
    for row in range(settings.batch_size):
        number = step * settings.batch_size + row
        drawn.append((_any(pictures.sets[number % len(pictures.sets)], generator), 1.0))
    for _ in range(settings.batch_size if pictures.priors else 0):
        drawn.append((_any(pictures.priors, generator), settings.prior_weight))
    groups: dict[Hashable, list[tuple[Tensor, Tensor, int, int, float]]] = {}
    for row, (example, weight) in enumerate(drawn):
        fraction = ((step * len(drawn) + row) * GOLDEN + start) % 1
        noise = torch.randn(example.latents.shape, generator=generator)
        timestep = settings.timestep(fraction, denoiser.timesteps)
        key = (example.latents.shape, denoiser.kind(example.prompt))
        part = (example.latents, noise, timestep, example.prompt, weight / settings.batch_size)
        groups.setdefault(key, []).append(part)
    return [_rows(parts) for parts in groups.values()]


def _probed_rows(pictures: Pictures, denoiser: Denoiser, settings: Settings, step: int) -> list[Rows]:
    """Those of the step, or, where none of them has the prompt that matters, of the picture with that one alone."""
    rows, scored = step_rows(pictures, denoiser, settings, step), pictures.scored
    if scored is None or any(scored.prompt in part.prompts for part in rows):
        return rows
    return step_rows(Pictures([[scored]]), denoiser, settings, step)


def _any(examples: Sequence[Example], generator: torch.Generator) -> Example:
    return examples[int(torch.randint(len(examples), (), generator=generator))]


def _rows(parts: Sequence[tuple[Tensor, Tensor, int, int, float]]) -> Rows:
    latents, noise, timesteps, prompts, weights = zip(*parts, strict=True)
    return Rows(
        torch.cat([part.cpu() for part in latents]),
        torch.cat(noise),
        torch.tensor(timesteps),
        tuple(prompts),
        torch.tensor(weights),
    )


def train(
    trained: Trainable,
    denoiser: Denoiser,
    pictures: Pictures,
    settings: Settings,
    on_step: Callable[[Step], None] | None = None,
    first: int = 0,
    adam: torch.optim.Adam | None = None,
) -> list[Step]:
    """Adam on the mean squared error of the raw prediction (DreamBooth, Eq. 2), from step `first` on.

    adam: of the groups of `trained`, where it has a past or is to be kept; None for a new one. Deterministic for a seed
    on one machine. What `on_step` or the denoiser raises ends the run, with `trained` as the last step left it. Raises
    FloatingPointError where a loss is not finite, with the layer of the largest update.
    """
    history: list[Step] = []
    with torch.inference_mode(False), torch.enable_grad():
        adam = adam or torch.optim.Adam(trained.groups(settings.learning_rate))
        parameters = [p for group in adam.param_groups for p in group["params"]]
        scale, skipped, step = float(denoiser.loss_scale), 0, first
        while step < settings.steps:

            def gradient(penalized: bool, step: int = step, scale: float = scale) -> tuple[float, float]:
                rows = step_rows if penalized else _probed_rows
                losses = _gradient(trained, denoiser, rows(pictures, denoiser, settings, step), scale, penalized)
                if not math.isfinite(sum(losses)):
                    raise FloatingPointError(
                        f"step {step + 1}: the loss is not finite{_largest(trained)}; lower learning_rate or load the "
                        "model in bf16 or fp32"
                    )
                return losses

            try:
                trained.before(step, lambda: gradient(penalized=False) and None)
                adam.zero_grad()
                loss, penalty = gradient(penalized=True)
                if not _descend(adam, parameters, scale):
                    raise GradientNotFinite(
                        f"step {step + 1}: the gradient is not finite although the loss ({loss:g}) is"
                    )
            except GradientNotFinite as error:
                skipped, scale = skipped + 1, scale / 4
                if skipped > MAX_SKIPPED:
                    raise FloatingPointError(
                        f"{error}, after {skipped} tries at smaller loss scales; load the model in bf16 or fp32"
                    ) from None
                continue
            skipped, step = 0, step + 1
            history.append(Step(step, settings.steps, loss, penalty))
            if on_step is not None:
                on_step(history[-1])
    return history


def _largest(trained: Trainable) -> str:
    layer = trained.largest()
    return "" if layer is None else f"; the largest update is that of layer '{layer}'"


def _gradient(
    trained: Trainable, denoiser: Denoiser, passes: Sequence[Rows], scale: float, penalized: bool
) -> tuple[float, float]:
    """Adds the gradient of scale · (loss + penalty); returns both without the scale."""
    total = 0.0
    for rows in passes:
        loss = _loss(trained, denoiser, rows)
        torch.autograd.backward(loss * scale)
        total += loss.item()
    penalty = trained.penalty() if penalized else None
    if penalty is None:
        return total, 0.0
    torch.autograd.backward(penalty * scale)
    return total, penalty.item()


def _loss(trained: Trainable, denoiser: Denoiser, rows: Rows) -> Tensor:
    prediction, target = denoiser(rows, trained.branch(rows))
    errors = (prediction - target).square().flatten(1).mean(1)
    return (errors * rows.weights.to(errors)).sum()


def mean_loss(
    trained: Trainable, denoiser: Denoiser, pictures: Pictures, settings: Settings, steps: Sequence[int]
) -> float:
    """Over the passes of these steps, as `train` would take them; nothing is learned. steps: at least one."""
    with torch.inference_mode(False), torch.no_grad():
        losses = [
            _loss(trained, denoiser, rows).item()
            for step in steps
            for rows in step_rows(pictures, denoiser, settings, step)
        ]
    return sum(losses) / len(steps)


def _descend(adam: torch.optim.Adam, parameters: Sequence[Tensor], scale: float) -> bool:
    """One update; False, and none, where the gradient is not finite."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        raise ValueError("no layer that is trained took part in the forward pass, so there is nothing to learn")
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))) / scale
    if not bool(torch.isfinite(norm)):
        return False
    torch._foreach_div_(gradients, scale * max(1.0, float(norm) / _LARGEST_NORM))
    adam.step()
    return True
