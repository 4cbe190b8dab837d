"""The plain sum cut to the largest rank among its LoRAs: as large a file as one of them."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..coefficients import Coefficients
from ..export import cut
from ..lora_set import Factors, Layer, LoRASet
from ..merge import merged_factors, one_lora
from .method import Method


def truncated(layer: Layer) -> Layer:
    """Σ_i ΔW_i cut to r = max r_i: U Uᵀ Σ_i ΔW_i, U (out, r) the sum's largest left singular vectors.

    The nearest matrix of rank r (Eckart and Young), from the factors alone (`export.cut`), in float64. Each LoRA keeps
    its own part, U · Uᵀ ΔW_i, on the same U. A sum that is no larger than r stays as it is.
    """
    rank = max(factors.rank for factors in layer.values())
    up, down = merged_factors(layer)
    if down.shape[0] <= rank:
        return layer
    left = torch.linalg.qr(cut(up.double(), down.double(), rank).up).Q
    basis = left.to(down.dtype)
    return {
        concept: Factors(basis, torch.tensordot(f.scale * left.T @ f.up.double(), f.down.double(), 1).to(down.dtype))
        for concept, f in layer.items()
    }


def merge(loras: LoRASet) -> LoRASet:
    return replace(loras, layers={name: truncated(layer) for name, layer in loras.layers.items()})


def energy(loras: LoRASet) -> float:
    """Σ ‖ΔW‖² of the plain sum over all layers, from the factors."""
    total = 0.0
    for layer in loras.layers.values():
        up, down = (factor.double().flatten(1) for factor in one_lora(layer))
        total += float(((up.T @ up) * (down @ down.T)).sum())
    return total


def told(before: LoRASet, after: LoRASet) -> list[str]:
    whole = energy(before)
    return [f"the cut keeps {energy(after) / whole if whole else 1:.1%} of the energy of the sum"]


METHOD = Method(
    "SVD",
    "the sum cut to the largest rank among the LoRAs",
    lambda loras: (merge(loras), Coefficients.ones(loras)),
    prepared=lambda loras, settings: merge(loras),
    called="Direct merge (sum cut by SVD)",
    told=told,
)
