"""A merge of several LoRAs without backpropagation: an input is routed to the LoRA whose reference it looks like.

So those whose concept nobody asked for stay silent. With A the rows of all LoRAs of a layer, one LoRA after another,
z = A x what they see of its input, B their ups with scales, P_r the identity on the rows of LoRA r and zero elsewhere,
the merge is ΔW = B M A with

    min over M of  Σ_r w_r E_r‖M z − P_r z‖²  +  λ ‖(M − 1) A‖²
    M = (Σ_r w_r P_r G_r + λ A Aᵀ) (Σ_r w_r G_r + λ A Aᵀ)⁻¹,        G_r = E_r[z zᵀ]

E_r is over what the layer sees under reference r. λ → ∞ is the direct merge; without a ridge it is SSR-Merge
(arXiv 2606.10617), RegMean (arXiv 2212.09849) on the rank axis. w_r is what LoRA r adds in that layer under the
references of the others, in the mean, and λ = ridge / n of n LoRAs times the mean of Σ_r w_r E_r[z²] against that of
A Aᵀ: the more LoRAs, the less their plain sum is worth. Convolutions are the same, with z what their down kernels give.

The rank and the files stay, ups and strengths too: each LoRA's down is M_r A. What is kept between passes is one R x R
matrix of a layer and reference, R the sum of the ranks. Layers of too many ranks are shared out by columns, as
`layerwise` does it. A reference counts in the layers that its own LoRA changes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import layerwise, shares
from .branch import Branch, JoinedSet, join
from .coefficients import Coefficients
from .frozen import Base, Update, project
from .lora_set import Layer, LoRASet
from .merge import merged_factors
from .shares import RIDGE, SolvedLayer
from .solver import Predictor, References

LARGEST = 1024  # ranks of a layer, summed: where updates come dense, they have more
ROOM = 4_000_000_000  # bytes of all that is added up; layers of the most ranks are left out first
# Layer -> M (R, R) float32 on the CPU, of the layers that several LoRAs change; or their downs M A themselves
# (R, in, kernel), where these are no mix of the LoRAs' own (`fusion`).
Routing = Mapping[str, Tensor]


def routable(loras: LoRASet) -> list[str]:
    """Layers that several LoRAs change, by few enough ranks each and together."""
    ranks = {name: sum(f.rank for f in layer.values()) for name, layer in loras.layers.items() if len(layer) > 1}
    chosen, room = [], ROOM
    for name in sorted(ranks, key=ranks.__getitem__):
        room -= 4 * len(loras.layers[name]) * ranks[name] ** 2
        if ranks[name] > LARGEST or room < 0:
            break
        chosen.append(name)
    return chosen


def routed(loras: LoRASet, routing: Routing) -> LoRASet:
    """The set that the merge's coefficients belong to: in layers with a matrix each LoRA's down is M_r A, in those with
    downs its part of these.

    Raises ValueError, naming the layer, where a matrix is not one of the set's ranks there.
    """
    layers = dict(loras.layers)
    for name, matrix in routing.items():
        layer = layers.get(name, {})
        ranks = [factors.rank for factors in layer.values()]
        mixes = matrix.ndim == 2 and matrix.shape == (sum(ranks), sum(ranks))
        if not ranks or not (mixes or (matrix.ndim == 3 and _as_downs(layer) == matrix.shape)):
            raise ValueError(f"layer '{name}': a matrix {tuple(matrix.shape)} does not route {sum(ranks)} ranks")
        _, rows = merged_factors(layer)
        parts = torch.split(_routed(rows, matrix), ranks)
        layers[name] = {c: replace(f, down=part) for (c, f), part in zip(layer.items(), parts, strict=True)}
    return replace(loras, layers=layers)


def _as_downs(layer: Layer) -> tuple[int, int, int]:
    """(R, in, kernel) of all downs of a layer."""
    rank, first = sum(factors.rank for factors in layer.values()), next(iter(layer.values())).down
    return rank, first.shape[1], first[0, 0].numel()


def _routed(rows: Tensor, matrix: Tensor) -> Tensor:
    """The downs (R, in, *kernel) that come of these."""
    return torch.tensordot(matrix.to(rows), rows, 1) if matrix.ndim == 2 else matrix.to(rows).view(rows.shape)


class RoutedBranch(Branch):
    """The merge in a forward pass, without a gradient and without a second copy of the factors.

    student: of the LoRAs as they are, with the merge's coefficients.
    """

    def __init__(self, student: Branch, routing: Routing):
        super().__init__(student._layers, coefficients=student._coefficients)
        self._routing = routing

    def layer(self, name: str, x: Tensor, base: Base, **convolution: Any) -> Tensor:
        layer, coefficients = self._layers[name], (self._coefficients or {})[name]
        if name in self._routing:
            down = layer.down.to(torch.promote_types(layer.down.dtype, torch.float32))
            layer = replace(layer, down=_routed(down, self._routing[name]))
        with torch.no_grad():
            y = base.forward(x)
            Update(layer, convolution).add(y, x, layer.up, layer.scaled_down(coefficients, x.dtype))
            return y


class Seen(layerwise.Sums):
    """G_r of layers: sums (R, R) float32 on the CPU."""

    def add(self, name: str, concept: str, z: Tensor) -> None:
        """z: (..., R), of any dtype; added up in float32 or wider."""
        rows = z.flatten(0, -2)
        rows = rows.to(torch.promote_types(z.dtype, torch.float32))
        self.put(name, concept, (rows.T @ rows).cpu(), len(rows))

    def pop(self, name: str, layer: Layer) -> dict[str, Tensor] | None:
        """Concept -> G_r float64 of a layer, kept here no longer; None where it took no part in a pass of theirs."""
        if not self.has(name, layer):
            return None
        return {c: self.sums.pop((name, c)).double() / self.counts[name, c] for c in layer}


class SeeingBranch(layerwise.RecordingBranch):
    """A teacher that adds up what all LoRAs see of its rows' input, in the layers that are routed; in the others how
    active their features are."""

    def __init__(
        self, joined: JoinedSet, concept_index: Tensor, names: Collection[str], seen: Seen, activity: layerwise.Activity
    ):
        super().__init__(joined, concept_index, activity)
        self._loras, self._names, self._seen = joined.loras, names, seen

    def layer(self, name: str, x: Tensor, base: Base, **convolution: Any) -> Tensor:
        if name not in self._names:
            return super().layer(name, x, base, **convolution)
        for concept, mine in self.own(x).items():
            if len(mine) and concept in self._loras.layers[name]:
                self._seen.add(name, concept, project(mine, self._layers[name].down, convolution))
        return Branch.layer(self, name, x, base, **convolution)


def matrix_of(layer: Layer, seen: Mapping[str, Tensor], ridge: float = RIDGE) -> tuple[Tensor, float]:
    """M (R, R) float64 of one layer, and its error Σ_r w_r E_r‖B (M − P_r) z‖² as a share of the direct merge's (1
    where that is 0).

    seen: concept -> G_r (R, R) float64.
    """
    joined = join(layer, next(iter(seen.values())).device, torch.float64)
    ups, rows, parts = joined.up.T @ joined.up, joined.down.flatten(1), joined.parts
    added = {
        (r, k): float((ups[part, part] * seen[k][part, part]).sum().clamp_min(0))
        for r, part in parts.items()
        for k in layer
        if k != r
    }
    weights = {r: sum(size for (mine, _), size in added.items() if mine == r) for r in layer}
    total = sum(weights.values())
    weights = {r: weight / total if total > 0 else 1 / len(weights) for r, weight in weights.items()}
    whole = torch.stack([weights[r] * seen[r] for r in layer]).sum(0)
    own = torch.zeros_like(whole)  # Σ_r w_r P_r G_r
    for r, part in parts.items():
        own[part] = weights[r] * seen[r][part]
    pull = rows @ rows.T
    size, seen_at_all = float(pull.diagonal().sum()), float(whole.diagonal().sum())
    if not size or not seen_at_all:
        return torch.eye(len(whole), dtype=whole.dtype), 1.0
    pull *= ridge / len(layer) * seen_at_all / size
    both = whole + pull
    both.diagonal().add_(1e-12 * float(both.diagonal().mean()))  # ranks that depend on each other
    matrix = torch.linalg.solve(both, own.T + pull).T
    at_zero = sum(float((ups[part, part] * own[part, part]).sum()) for part in parts.values())
    direct = float((ups * (whole - 2 * own)).sum()) + at_zero
    error = float(((ups @ matrix) * (matrix @ whole - 2 * own)).sum()) + at_zero
    return matrix, max(error, 0.0) / direct if direct > 0 else 1.0


def merge(
    joined: JoinedSet,
    predictor: Predictor,
    references: References,
    seed: int,
    on_layer: Callable[[SolvedLayer], None] | None = None,
    ridge: float = RIDGE,
) -> tuple[Routing, Coefficients]:
    """M of every layer that is routed, the coefficients of the others, from `layerwise.DRAWS` passes over the
    references; all ones where M is.

    A layer that took no part in a pass stays the sum. `on_layer` is called after each layer; what it or the predictor
    raises ends the run. Deterministic for a seed. Raises FloatingPointError where a layer's numbers are not finite.
    """
    loras, names, seen, activity = joined.loras, set(routable(joined.loras)), Seen(), layerwise.Activity()
    device = shares.device_of_float64(joined.device)
    routing, coefficients = {}, {c: dict(of) for c, of in Coefficients.ones(loras).by_concept.items()}
    with torch.inference_mode(False), torch.no_grad():
        layerwise.teach(predictor, references, seed, lambda index: SeeingBranch(joined, index, names, seen, activity))
        for index, (name, layer) in enumerate(loras.layers.items(), 1):
            error = 1.0
            if name in names:
                measured = seen.pop(name, layer)
                if measured is not None:
                    if not all(bool(g.isfinite().all()) for g in measured.values()):
                        raise shares.not_finite(name, "see")
                    matrix, error = matrix_of(layer, {c: g.to(device) for c, g in measured.items()}, ridge)
                    routing[name] = matrix.to("cpu", torch.float32)
            else:
                solved = shares.share_layer(name, layer, ridge, activity.of(name, list(layer)), device)
                error = solved.relative_error
                for concept, m in zip(layer, solved.coefficients, strict=True):
                    coefficients[concept][name] = m
            if on_layer is not None:
                on_layer(SolvedLayer(name, index, len(loras.layers), error))
    return routing, Coefficients(coefficients)
