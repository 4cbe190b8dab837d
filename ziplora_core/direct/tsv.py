"""TSV-Merge (arXiv 2412.00081): the largest singular parts of each LoRA, made orthogonal to those of the others."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..coefficients import Coefficients
from ..lora_set import Factors, Layer, LoRASet
from .method import Method

SMALLEST = 1e-7  # of the largest singular value: what is less counts as zero


def parts(factors: Factors, share: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, k), σ (k) and V (in · kernel, k): a `share`-th of ΔW's rank, rounded up, its largest, in float64.

    From the factors, no ΔW formed. k is 0 where ΔW is zero.
    """
    left = torch.linalg.qr(factors.scale * factors.up.double())
    right = torch.linalg.qr(factors.down.double().flatten(1).T)
    u, values, vh = torch.linalg.svd(left.R @ right.R.T)
    rank = int((values > values.max() * SMALLEST).sum())
    count = -(-rank // share)
    return left.Q @ u[:, :count], values[:count], right.Q @ vh[:count].T


def nearest(vectors: Tensor) -> Tensor:
    """The matrix with orthonormal columns that is nearest to this one (orthogonal Procrustes).

    Where columns depend on each other, in the space that they span: no direction comes in that none of them has.
    """
    left, values, right = torch.linalg.svd(vectors, full_matrices=False)
    count = int((values > values.max() * SMALLEST).sum())
    found: Tensor = left[:, :count] @ right[:count]
    return found


def merged(layer: Layer) -> Layer:
    """ΔW = Û diag(σ_1, …, σ_n) V̂ᵀ, with Û nearest to [U_1 | … | U_n] and V̂ to [V_1 | … | V_n].

    Each LoRA keeps its own columns of Û and V̂, so that their sum is the merge. Its rank is Σ k_i, about that of one
    file. Where two singular values are equal at the cut, what is kept is not unique.
    """
    found = [parts(factors, len(layer)) for factors in layer.values()]
    if not any(len(values) for _, values, _ in found):
        return layer
    counts = [len(values) for _, values, _ in found]
    joined = (nearest(torch.cat([part[side] for part in found], dim=1)) for side in (0, 2))
    lefts, rights = (torch.split(vectors, counts, dim=1) for vectors in joined)
    result = {}
    for (concept, f), (_, values, _), left, right in zip(layer.items(), found, lefts, rights, strict=True):
        if not len(values):
            result[concept] = Factors(torch.zeros_like(f.up[:, :1]), torch.zeros_like(f.down[:1]))
            continue
        root = values.sqrt()  # halves the size of both factors' range
        down = (root * right).T.reshape(len(values), *f.down.shape[1:])
        result[concept] = Factors((left * root).float(), down.float())
    return result


def merge(loras: LoRASet) -> LoRASet:
    """A layer that one LoRA alone changes stays as it is. The paper's scale of the merge, α, is 1."""
    layers = {name: merged(layer) if len(layer) > 1 else layer for name, layer in loras.layers.items()}
    return replace(loras, layers=layers)


METHOD = Method(
    "TSV-Merge",
    "the strongest half of each LoRA's directions (of three: a third), turned out of each other's way",
    lambda loras: (merge(loras), Coefficients.ones(loras)),
    prepared=lambda loras, settings: merge(loras),
    called="TSV-Merge",
)
