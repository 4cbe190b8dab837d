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
matrix of a layer and reference, R the sum of the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import layerwise
from .branch import Branch, JoinedSet
from .frozen import Base, Update, project
from .lora_set import Layer, LoRASet
from .merge import merged_factors
from .shares import RIDGE, SolvedLayer
from .solver import Predictor, References

LARGEST = 1024  # ranks of a layer, summed; where updates come dense, they have more, and their sum stays
Routing = Mapping[str, Tensor]  # layer -> M (R, R) float32 on the CPU, of the layers that several LoRAs change


def routable(layer: Layer) -> bool:
    """Whether several LoRAs change a layer, and by few enough ranks."""
    return len(layer) > 1 and sum(factors.rank for factors in layer.values()) <= LARGEST


def routed(loras: LoRASet, routing: Routing) -> LoRASet:
    """The set that draws as the merge does, all coefficients one: each LoRA's down is M_r A.

    Raises ValueError, naming the layer, where a matrix is not one of the set's ranks there.
    """
    layers = dict(loras.layers)
    for name, matrix in routing.items():
        layer = layers.get(name, {})
        ranks = [factors.rank for factors in layer.values()]
        if matrix.shape != (sum(ranks), sum(ranks)) or not ranks:
            raise ValueError(f"layer '{name}': a matrix {tuple(matrix.shape)} does not route {sum(ranks)} ranks")
        rows = torch.cat([f.down.to(torch.promote_types(f.down.dtype, torch.float32)) for f in layer.values()])
        parts = torch.tensordot(matrix.to(rows), rows, 1).split(ranks)
        layers[name] = {c: replace(f, down=part) for (c, f), part in zip(layer.items(), parts, strict=True)}
    return replace(loras, layers=layers)


class RoutedBranch(Branch):
    """The merge in a forward pass, without a gradient and without a second copy of the factors.

    dials: concept -> strength of its LoRA after the merge, 1 where none is said.
    """

    def __init__(self, joined: JoinedSet, routing: Routing, dials: Mapping[str, float] | None = None):
        super().__init__(joined.layers, coefficients={})
        self._routing, self._dials = routing, dials or {}

    def layer(self, name: str, x: Tensor, base: Base, **convolution: Any) -> Tensor:
        layer = self._layers[name]
        wide = torch.promote_types(layer.down.dtype, torch.float32)
        down = layer.down.to(wide)
        if name in self._routing:
            down = torch.tensordot(self._routing[name].to(down), down, 1)
        if self._dials:
            strengths = [self._dials.get(concept, 1.0) for concept in layer.ranks]
            each = torch.tensor(strengths).repeat_interleave(torch.tensor([*layer.ranks.values()]))
            down = down * each.to(down).view(-1, *[1] * (down.ndim - 1))
        with torch.no_grad():
            y = base.forward(x)
            Update(layer, convolution).add(y, x, layer.up, down.to(layer.down.dtype))
            return y


@dataclass
class Seen:
    """G_r of layers: sums (R, R) float32 on the CPU by layer and concept, and of how many rows."""

    sums: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    counts: dict[tuple[str, str], int] = field(default_factory=dict)

    def add(self, name: str, concept: str, z: Tensor) -> None:
        """z: (..., R), of any dtype; added up in float32 or wider."""
        rows = z.flatten(0, -2)
        rows = rows.to(torch.promote_types(z.dtype, torch.float32))
        products = (rows.T @ rows).cpu()
        key = (name, concept)
        self.sums[key] = self.sums[key] + products if key in self.sums else products
        self.counts[key] = self.counts.get(key, 0) + len(rows)

    def of(self, name: str, layer: Layer) -> dict[str, Tensor] | None:
        """Concept -> G_r float64 of a layer; None where it took no part in a pass of theirs."""
        if any((name, concept) not in self.sums for concept in layer):
            return None
        return {c: self.sums[name, c].double() / self.counts[name, c] for c in layer}


class SeeingBranch(Branch):
    """A teacher that adds up what all LoRAs see of its rows' input."""

    def __init__(self, joined: JoinedSet, concept_index: Tensor, seen: Seen):
        super().__init__(joined.layers, rows=joined.rows(concept_index))
        self._loras, self._seen = joined.loras, seen

    def layer(self, name: str, x: Tensor, base: Base, **convolution: Any) -> Tensor:
        if routable(self._loras.layers[name]):
            down = self._layers[name].down
            for concept, mine in self.own(x).items():
                if len(mine) and concept in self._loras.layers[name]:
                    self._seen.add(name, concept, project(mine, down, convolution))
        return super().layer(name, x, base, **convolution)


def record(joined: JoinedSet, predictor: Predictor, references: References, seed: int) -> Seen:
    """The passes of `layerwise`, in which what LoRAs see is added up."""
    seen = Seen()
    layerwise.teach(predictor, references, seed, lambda index: SeeingBranch(joined, index, seen))
    return seen


def matrix_of(layer: Layer, seen: Mapping[str, Tensor], ridge: float = RIDGE) -> tuple[Tensor, float]:
    """M (R, R) float64 of one layer, and its error Σ_r w_r E_r‖B (M − P_r) z‖² as a share of the direct merge's (1
    where that is 0).

    seen: concept -> G_r (R, R) float64.
    """
    up, down = (factor.double() for factor in merged_factors(layer))
    ups, rows = up.T @ up, down.flatten(1)
    ranks = [factors.rank for factors in layer.values()]
    ends = torch.tensor([0, *ranks]).cumsum(0).tolist()
    parts = dict(zip(layer, (slice(*ends[i : i + 2]) for i in range(len(ranks))), strict=True))
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
    pull = rows @ rows.T
    size = float(pull.diagonal().sum())
    pull = pull * (ridge / len(layer) * float(whole.diagonal().sum()) / size if size > 0 else 0.0)
    aimed = pull.clone()
    for r, part in parts.items():
        aimed[part] += weights[r] * seen[r][part]
    matrix = aimed @ torch.linalg.pinv(whole + pull, hermitian=True)

    def error(m: Tensor) -> float:
        parted = 0.0
        for r, part in parts.items():
            off = m.clone()
            off[part, part] -= torch.eye(ranks[list(parts).index(r)], dtype=m.dtype)
            parted += weights[r] * float(torch.sum((off.T @ ups @ off) * seen[r]))
        return parted

    direct = error(torch.eye(len(matrix), dtype=matrix.dtype))
    return matrix, max(error(matrix), 0.0) / direct if direct > 0 else 1.0


def merge(
    joined: JoinedSet,
    predictor: Predictor,
    references: References,
    seed: int,
    on_layer: Callable[[SolvedLayer], None] | None = None,
    ridge: float = RIDGE,
) -> Routing:
    """M of every layer that several LoRAs change, from `layerwise.DRAWS` passes over the references.

    A layer that took no part in a pass, or of too many ranks, stays the sum. `on_layer` is called after each layer;
    what it or the predictor raises ends the run. Deterministic for a seed. Raises FloatingPointError where a layer's
    numbers are not finite.
    """
    layers, routing = joined.loras.layers, {}
    with torch.inference_mode(False), torch.no_grad():
        seen = record(joined, predictor, references, seed)
        for index, (name, layer) in enumerate(layers.items(), 1):
            measured, error = seen.of(name, layer), 1.0
            if measured is not None and routable(layer):
                if not all(bool(g.isfinite().all()) for g in measured.values()):
                    raise FloatingPointError(
                        f"layer {name}: what the LoRAs see there is not finite; look at the LoRA's numbers, or load "
                        "the model in bf16 or fp32"
                    )
                matrix, error = matrix_of(layer, measured, ridge)
                routing[name] = matrix.float()
            if on_layer is not None:
                on_layer(SolvedLayer(name, index, len(layers), error))
    return routing
