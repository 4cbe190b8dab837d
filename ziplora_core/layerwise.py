"""A merge without backpropagation: what it changes in each layer's output, as a quadratic form.

With x the input of a layer under concept k's reference, G_ij = ΔW_iᵀ ΔW_j (from the factors) and C = E[x xᵀ],

    E‖ΔW_k·diag(m_k − 1)·x + Σ_{i≠k} ΔW_i·diag(m_i)·x‖² = uᵀ H u,    u = (m_1, …, m_k − 1, …, m_n),    H = G ∘ C,

and so for each concept with its own H. The inputs are those that each concept's own LoRA sees: a few forward passes,
no gradient. The sum over concepts has its minimum in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import shares
from .branch import Branch, JoinedSet
from .coefficients import Coefficients
from .draws import spread_batches
from .frozen import Base, JoinedLayer
from .lora_set import LoRASet, columns
from .solver import Predictor, References, Settings

_DRAWS = 8  # passes over all references, spread over the timesteps
_SEED = 0x1A7E  # added to the seed: noise apart from training's and from measuring's
MOMENTS = 2**30  # bytes of moments kept at once
_EXACT, _REFINEMENTS = 1e-12, 8  # of a refined solution: residual over right-hand side, and tries
_POSITIONS = 64  # of a convolution's output, per row and pass: enough of them, and of bounded cost


@dataclass
class _Sum:
    total: Tensor
    count: int = 0

    @property
    def mean(self) -> Tensor:
        return self.total / max(self.count, 1)


@dataclass
class Moments:
    """Second moments of what layers see, by concept; layers with the same input (q, k and v; prompts) share them.

    source: layer -> the first layer that had the same input. A convolution keeps its form H, a linear layer C.
    """

    names: frozenset[str]
    keep: bool = True
    source: dict[str, str] = field(default_factory=dict)
    sums: dict[tuple[str, str], _Sum] = field(default_factory=dict)

    def add(self, name: str, concept: str, rows: Tensor) -> None:
        """rows: (samples, n) float32; adds rowsᵀ rows."""
        self.add_form(name, concept, rows.T @ rows, len(rows))

    def add_form(self, name: str, concept: str, form: Tensor, count: int) -> None:
        seen = self.sums.setdefault((name, concept), _Sum(torch.zeros_like(form)))
        seen.total += form
        seen.count += count

    def forms(self, name: str, layer: JoinedLayer) -> dict[str, Tensor]:
        """H of a layer under each concept's reference, float32; columns as in `stacked`."""
        source = self.source[name]
        means = {concept: seen.mean for (first, concept), seen in self.sums.items() if first == source}
        if layer.down.ndim > 2:
            return means
        count, g = len(layer.parts), gram(layer)
        return {concept: g * mean.repeat(count, count) for concept, mean in means.items()}


def stacked(layer: JoinedLayer, down: Tensor) -> Tensor:
    """down (..., R, n) as (..., R, LoRAs · n): each LoRA's part of the rank axis beside the others, zeros elsewhere."""
    blocks = []
    for part in layer.parts.values():
        block = torch.zeros_like(down)
        block[..., part, :] = down[..., part, :]
        blocks.append(block)
    return torch.cat(blocks, dim=-1)


def gram(layer: JoinedLayer) -> Tensor:
    """ΔWᵀ ΔW of [ΔW_1 | … | ΔW_n] beside each other, (LoRAs · columns, LoRAs · columns) float32."""
    up, down = layer.up.float(), stacked(layer, layer.down.float())
    return down.T @ ((up.T @ up) @ down)


def _convolution_form(layer: JoinedLayer, x: Tensor, **convolution: Any) -> tuple[Tensor, int]:
    """(Σ over sampled output positions of each column's output times each other's, number of positions)."""
    kernel = tuple(layer.down.shape[2:])
    patches = F.unfold(x.float(), kernel, **convolution)  # rows, n · kernel, positions
    every = max(1, patches.shape[2] // _POSITIONS)
    chosen = patches[:, :, ::every].movedim(1, 2).reshape(-1, layer.columns, patches.shape[1] // layer.columns)
    up, down = layer.up.float(), layer.down.float().flatten(2)
    out = torch.einsum("rnk,snk->srn", down, chosen)  # each column's part of the hidden channels
    factor = torch.linalg.qr(up, mode="r").R  # ‖up h‖ = ‖factor h‖
    rows = (factor @ stacked(layer, out)).flatten(0, 1)
    return rows.T @ rows, len(chosen)


def _version(x: Tensor) -> int:
    """Changes when a tensor is changed in place, where torch counts that."""
    return 0 if x.is_inference() else int(x._version)


class RecordingBranch(Branch):
    """A teacher that adds up second moments of what its layers see."""

    def __init__(self, joined: JoinedSet, concept: Tensor, moments: Moments):
        super().__init__(joined.layers, rows=joined.rows(concept))
        self._moments = moments
        self._recent: list[tuple[Tensor, int, str]] = []  # kept alive, so that `is` means the same input

    def layer(self, name: str, x: Tensor, base: Base, **convolution: Any) -> Tensor:
        if name in self._moments.names:
            self._record(name, x, convolution)
        return super().layer(name, x, base, **convolution)

    def _record(self, name: str, x: Tensor, convolution: dict[str, Any]) -> None:
        layer = self._layers[name]
        linear = layer.down.ndim == 2
        for seen, version, source in self._recent:
            if seen is x and version == _version(x) and linear:
                self._moments.source[name] = source
                return
        self._moments.source[name] = name
        if linear:
            self._recent = [*self._recent[-7:], (x, _version(x), name)]
        if not self._moments.keep:
            return
        for concept, mine in self.own(x).items():
            if not len(mine):
                continue
            if linear:
                self._moments.add(name, concept, mine.flatten(0, -2).float())
            else:
                self._moments.add_form(name, concept, *_convolution_form(layer, mine, **convolution))


@dataclass(frozen=True)
class SolvedLayer:
    """One layer is done: its name, its number (from 1) of `layers`, what is left of the direct merge's error there."""

    name: str
    index: int
    layers: int
    left: float


@dataclass(frozen=True)
class Quadratic:
    """zᵀ Q z − 2 bᵀ z + constant in the coefficients z = (m_1, …, m_n) of the LoRAs that change a layer."""

    q: Tensor
    b: Tensor
    constant: float

    def __call__(self, z: Tensor) -> float:
        return (z @ (self.q @ z - 2 * self.b)).item() + self.constant

    def left(self, z: Tensor) -> float:
        """The error at z over that of the direct merge; 1 where there is none to take away."""
        direct = self(torch.ones_like(z))
        return max(self(z), 0.0) / direct if direct > 0 else 1.0


def quadratic(layer: JoinedLayer, forms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Quadratic:
    """The layer's error under all references, each times its weight. forms: concept -> H."""
    q = torch.stack([weights[c] * form for c, form in forms.items()]).sum(0)
    b, constant = q.new_zeros(len(q)), 0.0
    for number, concept in enumerate(layer.parts):
        own = slice(number * layer.columns, (number + 1) * layer.columns)
        row = weights[concept] * forms[concept][:, own].sum(1)
        b, constant = b + row, constant + row[own].sum().item()
    return Quadratic(q, b, constant)


def error_at_direct(layer: JoinedLayer, forms: Mapping[str, Tensor]) -> dict[str, float]:
    """E‖·‖² of the direct merge under each reference: what the other LoRAs add to the layer's output.

    Where there is no other LoRA, what the reference's own adds.
    """
    places = {c: slice(i * layer.columns, (i + 1) * layer.columns) for i, c in enumerate(layer.parts)}
    errors: dict[str, float] = {}
    for reference, form in forms.items():
        others = [place for concept, place in places.items() if concept != reference] or list(places.values())
        errors[reference] = sum(form[one, other].sum().item() for one in others for other in others)
    return errors


def solve(problem: Quadratic, ridge: float, towards: Tensor | None = None) -> Tensor:
    """argmin zᵀQz − 2 bᵀz + ridge·mean(diag Q)·‖z − towards‖², by Cholesky after scaling the diagonal to one.

    The ridge keeps columns of which the references say little near `towards`; None: near one. Factored in float32,
    where graphics cards are many times faster, and refined in float64 until that is what it equals; factored in
    float64 where it does not get there.
    """
    device = "cpu" if problem.q.device.type == "mps" else problem.q.device  # which has no float64
    q = problem.q.to(device, torch.float64, copy=True)
    shift = ridge * q.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    q.diagonal().add_(shift)
    pull = 1.0 if towards is None else towards.to(device, torch.float64)
    b = problem.b.to(device, torch.float64) + shift * pull
    scale = q.diagonal().rsqrt()
    q.mul_(scale).mul_(scale[:, None])
    z = _refined(q, scale * b)
    if z is None:
        z = torch.cholesky_solve((scale * b)[:, None], torch.linalg.cholesky(q))[:, 0]
    return (scale * z).to(problem.b)


def _refined(q: Tensor, b: Tensor) -> Tensor | None:
    """The solution of q z = b to float64's own accuracy from a factor in float32; None where that is not to be had."""
    factor, info = torch.linalg.cholesky_ex(q.float())
    if int(info) != 0:
        return None
    z, goal = torch.zeros_like(b), _EXACT * b.norm()
    for _ in range(_REFINEMENTS):
        residual = b - q @ z
        if residual.norm() <= goal:
            return z
        z += torch.cholesky_solve(residual.float()[:, None], factor)[:, 0].double()
    return None


def _moments_size(columns: int, convolution: bool, loras: int, concepts: int) -> int:
    """Bytes of one layer's: n x n of a linear layer, of a convolution's joined columns, for each concept."""
    side = columns * (loras if convolution else 1)
    return concepts * 4 * side * side


def moments_at_most(loras: LoRASet) -> int:
    """Bytes of all layers' moments at once, were no two to share an input."""
    total = 0
    for layer in loras.layers.values():
        convolution = next(iter(layer.values())).down.ndim > 2
        total += _moments_size(columns(layer), convolution, len(layer), len(loras.concepts))
    return total


def passes(loras: LoRASet, budget: int) -> int:
    """About how many passes over all references `merge` takes; fewer where layers share their inputs."""
    return 1 + _DRAWS * max(1, math.ceil(moments_at_most(loras) / budget))


def _chunks(joined: JoinedSet, source: Mapping[str, str], budget: int) -> Iterator[list[str]]:
    """Layers in groups whose moments fit into `budget` bytes; layers with one input stay together."""
    groups: dict[str, list[str]] = {}
    for name, first in source.items():
        groups.setdefault(first, []).append(name)
    chunk: list[str] = []
    used = 0
    for first, names in groups.items():
        layer = joined.layers[first]
        size = _moments_size(layer.columns, layer.down.ndim > 2, len(layer.parts), len(joined.concepts))
        if chunk and used + size > budget:
            yield chunk
            chunk, used = [], 0
        chunk, used = [*chunk, *names], used + size
    if chunk:
        yield chunk


def merge(
    joined: JoinedSet,
    predictor: Predictor,
    references: References,
    seed: int,
    on_layer: Callable[[SolvedLayer], None] | None = None,
    ridge: float = Settings.ridge,
    budget: int = MOMENTS,
) -> Coefficients:
    """The coefficients that change each layer's output least, layer by layer, in closed form.

    In each layer the error under a reference counts in parts of what the direct merge does to it, and the ridge pulls
    towards the merge by the weights alone (`shares`), which layers that take no part in a pass have. No gradient
    through the network: about `_DRAWS` teacher passes, more of them where the moments (n x n for each distinct
    input of width n and each concept) exceed `budget` bytes and layers are taken in groups. `on_layer`
    is called after each; what it or the predictor raises ends the run. Deterministic for a seed. Raises
    FloatingPointError when a layer's numbers are not finite.
    """
    found = {concept: dict(known) for concept, known in shares.merge(joined.loras).by_concept.items()}
    with torch.inference_mode(False), torch.no_grad():
        source = _record(joined, predictor, references, seed, draws=1, names=joined.layers, keep=False).source
        done = 0
        for names in _chunks(joined, source, budget):
            moments = _record(joined, predictor, references, seed, _DRAWS, names)
            for name in names:
                layer = joined.layers[name]
                forms = moments.forms(name, layer)
                direct = error_at_direct(layer, forms)
                if not all(math.isfinite(error) for error in direct.values()):
                    raise FloatingPointError(
                        f"layer {name}: what the LoRAs do there is not finite; look at the LoRA's numbers, or load the "
                        "model in bf16 or fp32"
                    )
                weights = {concept: 1 / error if error > 0 else 0.0 for concept, error in direct.items()}
                problem = quadratic(layer, forms, weights)
                towards = torch.cat([found[concept][name] for concept in layer.parts])
                solution = solve(problem, ridge, towards)
                for concept, part in zip(layer.parts, torch.split(solution, layer.columns), strict=True):
                    found[concept][name] = part.to("cpu", torch.float32, copy=True)
                done += 1
                if on_layer is not None:
                    on_layer(SolvedLayer(name, done, len(source), problem.left(solution)))
    return Coefficients(found)


def _record(
    joined: JoinedSet,
    predictor: Predictor,
    references: References,
    seed: int,
    draws: int,
    names: Iterable[str],
    keep: bool = True,
) -> Moments:
    """Teacher passes in which the inputs of some layers are added up, or (keep=False) only told apart."""
    moments = Moments(frozenset(names), keep)
    for batches in spread_batches(references, predictor, seed + _SEED, draws):
        for batch in batches:
            predictor(batch, RecordingBranch(joined, batch.concept, moments))
    return moments
