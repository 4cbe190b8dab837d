"""Mix-of-Show's gradient fusion (arXiv 2305.18292, Sec. 3.3) of any number of LoRAs, in closed form.

A layer should do under each reference what it does with that reference's LoRA alone:

    min over W of  Σ_r E_r‖W x − (W0 + ΔW_r) x‖²  +  λ ‖W − W0‖²
    W = W0 + (Σ_r ΔW_r C_r) (Σ_r C_r + λ)⁻¹,        C_r = E_r[x xᵀ]

E_r is the mean over what the layer sees under reference r, where x is all that a convolution's kernel sees, and ΔW_r is
zero in a layer that LoRA r leaves alone. λ = ridge times the mean of the eigenvalues of Σ_r C_r. The paper takes steps
of LBFGS from W0, which stay among the inputs that were seen: what they go to is the minimum for λ → 0.

Σ_r ΔW_r C_r = Σ_r B_r (A_r C_r), so the ups and the sum of the ranks stay, and each LoRA has a new down,

    A_r C_r (Σ_r C_r + λ)⁻¹,

for which Σ_r C_r and E_r[(A_r x) xᵀ] are added up. The first is n x n of a layer with n inputs; layers that see the
same tensor, as q, k and v do, share it. Where all of them do not fit into `ROOM`, the passes are made again for the
rest. Layers of too many inputs are shared out by columns, as `layerwise` does it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import layerwise, shares
from .branch import Branch, JoinedSet, join
from .coefficients import Coefficients
from .frozen import Base
from .lora_set import Layer, columns
from .routing import Routing
from .shares import SolvedLayer
from .solver import Predictor, References

LARGEST = 6000  # inputs of a layer, times its kernel
ROOM = 4_000_000_000  # bytes of all that is added up in one round of passes
RIDGE = 1e-3


def width(layer: Layer) -> int:
    """Numbers that the layer sees at a position: inputs, times its kernel."""
    return prod(next(iter(layer.values())).down.shape[1:])


def patches(x: Tensor, kernel: torch.Size, convolution: Mapping[str, Any]) -> Tensor:
    """What a layer sees at each position: (positions, in · kernel), as the columns of a flattened `down`.

    x: (rows, in, *space) of a convolution; (rows, ..., in) of a linear layer, whose kernel is empty.
    """
    if not kernel:
        return x.flatten(0, -2)
    count = len(kernel)
    stride, padding, dilation = (convolution.get(k, d) for k, d in (("stride", 1), ("padding", 0), ("dilation", 1)))
    every = [v if isinstance(v, tuple) else (v,) * count for v in (stride, padding, dilation)]
    x = F.pad(x, [p for one in reversed(every[1]) for p in (one, one)])
    for axis, (size, step, apart) in enumerate(zip(kernel, every[0], every[2], strict=True), 2):
        x = x.unfold(axis, (size - 1) * apart + 1, step)[..., ::apart]
    return x.movedim(1, 1 + count).flatten(1 + count).flatten(0, count)


@dataclass
class _Shared:
    """Σ_r C_r of an input that one or more layers see, and how often it was added to."""

    total: Tensor
    calls: int = 0


@dataclass
class _Seen:
    """Of a layer: E_r[(A_r x) xᵀ] on the ranks of each LoRA r, (R, n); under whose references; how often."""

    inputs: _Shared
    targets: Tensor
    concepts: set[str] = field(default_factory=set)
    calls: int = 0


class Moments:
    """What one round of passes adds up, on the CPU in float32 or wider: of as many layers as fit."""

    def __init__(self, names: set[str], room: int):
        self.layers: dict[str, _Seen] = {}
        self._names, self._room = names, room

    def open(self, name: str, n: int, rank: int, dtype: torch.dtype, inputs: _Shared | None) -> _Seen | None:
        """A layer's sums; None where there is no room for a new one. inputs: of a layer that sees the same."""
        if name in self.layers or name not in self._names:
            return self.layers.get(name)
        size = dtype.itemsize * (rank * n + (n * n if inputs is None else 0))
        if self.layers and size > self._room:
            return None
        self._room -= size
        shared = _Shared(torch.zeros(n, n, dtype=dtype)) if inputs is None else inputs
        self.layers[name] = _Seen(shared, torch.zeros(rank, n, dtype=dtype))
        return self.layers[name]

    def pop(self, name: str, layer: Layer) -> tuple[Tensor, Tensor] | None:
        """(Σ_r C_r, its targets) float64, kept here no longer; None where a LoRA's reference did not reach the layer,
        or reached not all layers that see the same."""
        seen = self.layers.pop(name)
        if not set(layer) <= seen.concepts or seen.calls != seen.inputs.calls:
            return None
        return seen.inputs.total.double(), seen.targets.double()


class FusingBranch(layerwise.RecordingBranch):
    """A teacher that adds up moments of what its layers see; of the `wide` ones how active their features are."""

    def __init__(
        self,
        joined: JoinedSet,
        concept_index: Tensor,
        wide: set[str],
        moments: Moments,
        activity: layerwise.Activity,
    ):
        super().__init__(joined, concept_index, activity)
        self._loras, self._wide, self._moments = joined.loras, wide, moments
        self._recent: list[tuple[weakref.ref[Tensor], Any, _Shared]] = []  # inputs of this pass that are still there

    def layer(self, name: str, x: Tensor, base: Base, **convolution: Any) -> Tensor:
        if name in self._wide:
            return super().layer(name, x, base, **convolution)
        down = self._layers[name].down
        version = 0 if x.is_inference() else x._version
        like = (version, down.shape[2:], convolution)
        self._recent = [known for known in self._recent if known[0]() is not None]
        same = next((shared for ref, how, shared in self._recent if ref() is x and how == like), None)
        dtype = torch.promote_types(x.dtype, torch.float32)
        seen = self._moments.open(name, down[0].numel(), len(down), dtype, same)
        if seen is not None:
            first = seen.inputs is not same
            if first:
                self._recent.append((weakref.ref(x), like, seen.inputs))
            self._add(name, seen, x, first, convolution)
        return Branch.layer(self, name, x, base, **convolution)

    def _add(self, name: str, seen: _Seen, x: Tensor, first: bool, convolution: Mapping[str, Any]) -> None:
        """first: this layer, not one that sees the same, adds its input. Every reference counts alike in a pass."""
        layer, kernel, wide = self._loras.layers[name], self._layers[name].down.shape[2:], seen.targets.dtype
        seen.calls += 1
        seen.inputs.calls += first
        for concept, mine in self.own(x).items():
            if not len(mine):
                continue
            part = self._layers[name].parts.get(concept)
            down = None if part is None else layer[concept].down.to(x.device, wide).flatten(1)
            inputs, targets = (mine.new_zeros(of.shape, dtype=wide) for of in (seen.inputs.total, seen.targets))
            positions = 0
            for some in torch.split(mine, 1 if kernel else len(mine)):
                rows = patches(some, kernel, convolution).to(wide)
                positions += len(rows)
                if first:
                    inputs.addmm_(rows.T, rows)
                if down is not None:
                    targets[part].addmm_(down @ rows.T, rows)
            seen.concepts.add(concept)
            if first:
                seen.inputs.total += (inputs / positions).cpu()
            if part is not None:
                seen.targets[part] += (targets[part] / positions).cpu()


def downs_of(layer: Layer, inputs: Tensor, targets: Tensor, ridge: float = RIDGE) -> tuple[Tensor, float]:
    """The new downs of a layer's LoRAs, one after another, (R, n), and the error Σ_r E_r‖(ΔW − ΔW_r) x‖² as a share
    of the direct merge's (1 where that is 0 but for rounding).

    inputs: Σ_r C_r (n, n) float64. targets: A_r C_r of each LoRA, one after another, (R, n) float64.
    """
    joined = join(layer, inputs.device, inputs.dtype)
    ups, rows = joined.up.T @ joined.up, joined.down.flatten(1)
    size = float(inputs.diagonal().mean())
    if not size:
        return rows, 1.0
    pulled = inputs.clone()
    pulled.diagonal().add_(ridge * size)
    downs = torch.linalg.solve(pulled, targets.T).T
    at_zero = sum(float((ups[p, p] * (targets[p] @ rows[p].T)).sum()) for p in joined.parts.values())

    def error(of: Tensor) -> float:
        return float((ups * (of @ inputs @ of.T - 2 * of @ targets.T)).sum()) + at_zero

    direct = error(rows)
    return downs, max(error(downs), 0.0) / direct if direct > 1e-6 * at_zero else 1.0


def fuse_linear(layer: Layer, seen: Mapping[str, Tensor], ridge: float = RIDGE) -> tuple[dict[str, Tensor], float]:
    """A linear layer from its inputs themselves: concept -> its new down (r, in) float32, of those that change the
    layer, and the error as of `downs_of`.

    seen: concept -> (positions, in), what the layer sees under its reference, also of those that leave it alone.
    Raises KeyError where one that changes the layer is not in it.
    """
    moments = {c: rows.T @ rows / len(rows) for c, rows in ((c, x.double()) for c, x in seen.items())}
    inputs = torch.stack(list(moments.values())).sum(0)
    targets = torch.cat([f.down.to(inputs) @ moments[c] for c, f in layer.items()])
    downs, error = downs_of(layer, inputs, targets, ridge)
    parts = torch.split(downs.float(), [f.rank for f in layer.values()])
    return dict(zip(layer, parts, strict=True)), error


def merge(
    joined: JoinedSet,
    predictor: Predictor,
    references: References,
    seed: int,
    on_layer: Callable[[SolvedLayer], None] | None = None,
    ridge: float = RIDGE,
) -> tuple[Routing, Coefficients]:
    """The new downs (R, in, kernel) float32 of every layer that is fused, the coefficients of the others; all ones
    where it is fused. From `layerwise.DRAWS` passes over the references, several times where memory asks for it.

    A layer that took no part in a pass stays the sum. `on_layer` is called after each layer; what it or the predictor
    raises ends the run. Deterministic for a seed. Raises FloatingPointError where a layer's numbers are not finite.
    """
    loras, activity = joined.loras, layerwise.Activity()
    device = shares.device_of_float64(joined.device)
    routing, coefficients = {}, {c: dict(of) for c, of in Coefficients.ones(loras).by_concept.items()}
    wide = {name for name, layer in loras.layers.items() if width(layer) > LARGEST}
    left = set(loras.layers) - wide
    done = 0

    def tell(name: str, error: float) -> None:
        nonlocal done
        done += 1
        if on_layer is not None:
            on_layer(SolvedLayer(name, done, len(loras.layers), error))

    with torch.inference_mode(False), torch.no_grad():
        for moments in _rounds(joined, predictor, references, seed, wide, left, activity):
            for name in list(moments.layers):
                layer, error = loras.layers[name], 1.0
                measured = moments.pop(name, layer)
                if measured is not None:
                    if not all(bool(of.isfinite().all()) for of in measured):
                        raise shares.not_finite(name, "see")
                    inputs, targets = (of.to(device) for of in measured)
                    downs, error = downs_of(layer, inputs, targets, ridge)
                    routing[name] = downs.to("cpu", torch.float32).view(len(downs), columns(layer), -1)
                left.remove(name)
                tell(name, error)
        for name, layer in loras.layers.items():
            if name in wide:
                solved = shares.share_layer(name, layer, shares.RIDGE, activity.of(name, list(layer)), device)
                for concept, m in zip(layer, solved.coefficients, strict=True):
                    coefficients[concept][name] = m
                tell(name, solved.relative_error)
            elif name in left:
                tell(name, 1.0)
    return routing, Coefficients(coefficients)


def _rounds(
    joined: JoinedSet,
    predictor: Predictor,
    references: References,
    seed: int,
    wide: set[str],
    left: set[str],
    activity: layerwise.Activity,
) -> Iterator[Moments]:
    """Passes until every layer of `left`, from which the caller takes what it has solved, was added up or none can be.

    The first round tells the activity of the `wide` layers too.
    """
    apart, found = wide, True
    while apart or (left and found):
        moments = Moments(left, ROOM)

        def teacher(index: Tensor, apart: set[str] = apart, moments: Moments = moments) -> Branch:
            return FusingBranch(joined, index, apart, moments, activity)

        layerwise.teach(predictor, references, seed, teacher)
        apart, found = set(), bool(moments.layers)
        yield moments
