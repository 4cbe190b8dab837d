"""The layer-wise solve with whole second moments of what layers see, which couple all columns of a layer.

With x the input of a layer under concept r's reference, G_ab = ΔW_aᵀ ΔW_b (from the factors) and C = E_r[x xᵀ], what a
merge changes in the layer's output is a quadratic form H = G ∘ C in its coefficients; the sum over both references has
its minimum in closed form. The default was this until it was measured that pictures are as good with C's diagonal alone
(`ziplora_core/layerwise.py`), which needs no n x n matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.studio import core

CONCEPTS = ("content", "style")
POSITIONS = 64  # of a convolution's output, per row and pass


@dataclass
class Sum:
    total: Tensor
    count: int = 0

    @property
    def mean(self) -> Tensor:
        return self.total / max(self.count, 1)


@dataclass
class Moments:
    """By layer and concept; layers with the same input (q, k and v; prompts) share them.

    source: layer -> the first layer that had the same input. A convolution keeps its form H, a linear layer C.
    """

    source: dict[str, str] = field(default_factory=dict)
    sums: dict[tuple[str, str], Sum] = field(default_factory=dict)

    def add(self, name: str, concept: str, rows: Tensor) -> None:
        """rows: (samples, n) float32; adds rowsᵀ rows."""
        self.add_form(name, concept, rows.T @ rows, len(rows))

    def add_form(self, name: str, concept: str, form: Tensor, count: int) -> None:
        seen = self.sums.setdefault((name, concept), Sum(torch.zeros_like(form)))
        seen.total += form
        seen.count += count

    def forms(self, name: str, layer: Any) -> dict[str, Tensor]:
        """H of a layer under each concept's reference, float32; columns as in `stacked`."""
        means = {concept: self.sums[self.source[name], concept].mean for concept in CONCEPTS}
        if layer.down.ndim > 2:
            return means
        count, g = len(halves(layer)), gram(layer)
        return {concept: g * mean.repeat(count, count) for concept, mean in means.items()}


def halves(layer: Any) -> list[tuple[str, slice]]:
    """The concepts that change a layer, content first, and their part of the rank axis."""
    return list(layer.parts.items())


def stacked(layer: Any, down: Tensor) -> Tensor:
    """down (..., R, n) as (..., R, halves · n): each half of the rank axis beside the other, zeros elsewhere."""
    blocks = []
    for _, part in halves(layer):
        block = torch.zeros_like(down)
        block[..., part, :] = down[..., part, :]
        blocks.append(block)
    return torch.cat(blocks, dim=-1)


def gram(layer: Any) -> Tensor:
    """ΔWᵀ ΔW of [ΔW_c | ΔW_s] beside each other, (halves · n, halves · n) float32."""
    up, down = layer.up.float(), stacked(layer, layer.down.float())
    return down.T @ ((up.T @ up) @ down)


def convolution_form(layer: Any, x: Tensor, **convolution: Any) -> tuple[Tensor, int]:
    """(Σ over sampled output positions of each column's output times each other's, number of positions)."""
    kernel = tuple(layer.down.shape[2:])
    patches = F.unfold(x.float(), kernel, **convolution)  # rows, n · kernel, positions
    every = max(1, patches.shape[2] // POSITIONS)
    chosen = patches[:, :, ::every].movedim(1, 2).reshape(-1, layer.columns, patches.shape[1] // layer.columns)
    up, down = layer.up.float(), layer.down.float().flatten(2)
    out = torch.einsum("rnk,snk->srn", down, chosen)  # each column's part of the hidden channels
    factor = torch.linalg.qr(up, mode="r").R  # ‖up h‖ = ‖factor h‖
    rows = (factor @ stacked(layer, out)).flatten(0, 1)
    return rows.T @ rows, len(chosen)


class MomentsBranch(core.branch.Branch):
    """A teacher that adds up second moments of what its layers see."""

    def __init__(self, joined: Any, concept: Tensor, moments: Moments):
        super().__init__(joined.layers, rows=joined.rows(concept))
        self._moments = moments
        self._recent: list[tuple[Tensor, str]] = []  # kept alive, so that `is` means the same input

    def layer(self, name: str, x: Tensor, base: Any, **convolution: Any) -> Tensor:
        self._record(name, x, convolution)
        return super().layer(name, x, base, **convolution)

    def _record(self, name: str, x: Tensor, convolution: dict[str, Any]) -> None:
        layer = self._layers[name]
        linear = layer.down.ndim == 2
        for seen, source in self._recent:
            if seen is x and linear:
                self._moments.source[name] = source
                return
        self._moments.source[name] = name
        if linear:
            self._recent = [*self._recent[-7:], (x, name)]
        for concept, mine in self.own(x).items():
            if not len(mine):
                continue
            if linear:
                self._moments.add(name, concept, mine.flatten(0, -2).float())
            else:
                self._moments.add_form(name, concept, *convolution_form(layer, mine, **convolution))


def record(joined: Any, predictor: Any, references: Any, seed: int, moments: Moments | None = None) -> Moments:
    """Teacher passes in which the moments of every layer are added up, on the noise of the core's layer-wise solve."""
    moments = moments or Moments()
    core.layerwise.teach(predictor, references, seed, lambda index: MomentsBranch(joined, index, moments))
    return moments


@dataclass(frozen=True)
class Quadratic:
    """zᵀ Q z − 2 bᵀ z + constant in the coefficients z = (m_c, m_s) of one layer, or those that it has."""

    q: Tensor
    b: Tensor
    constant: float


def quadratic(layer: Any, forms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Quadratic:
    """The layer's error under both references, each times its weight. forms: concept -> H."""
    q = torch.stack([weights[c] * forms[c] for c in CONCEPTS]).sum(0)
    b, constant = q.new_zeros(len(q)), 0.0
    for number, (concept, _) in enumerate(halves(layer)):
        own = slice(number * layer.columns, (number + 1) * layer.columns)
        row = weights[concept] * forms[concept][:, own].sum(1)
        b, constant = b + row, constant + row[own].sum().item()
    return Quadratic(q, b, constant)


def error_at_direct(layer: Any, forms: Mapping[str, Tensor]) -> dict[str, float]:
    """E‖·‖² of the direct merge under each reference: what the other LoRA adds to the layer's output.

    Where there is no other LoRA, what the reference's own adds.
    """
    added = {}  # LoRA -> what it adds under each reference
    for number, (concept, _) in enumerate(halves(layer)):
        part = slice(number * layer.columns, (number + 1) * layer.columns)
        added[concept] = {reference: forms[reference][part, part].sum().item() for reference in CONCEPTS}
    disturber = {"content": "style", "style": "content"}
    return {c: added.get(disturber[c], added.get(c, {}))[c] for c in CONCEPTS}


def solve(problem: Quadratic, ridge: float) -> Tensor:
    """argmin zᵀQz − 2 bᵀz + ridge·mean(diag Q)·‖z − 1‖², by Cholesky in float64 after scaling the diagonal to one."""
    q = problem.q.double()
    shift = ridge * q.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    q.diagonal().add_(shift)
    b = problem.b.double() + shift
    scale = q.diagonal().rsqrt()
    z = torch.cholesky_solve((scale * b)[:, None], torch.linalg.cholesky(q * scale * scale[:, None]))[:, 0]
    return (scale * z).to(problem.b)
