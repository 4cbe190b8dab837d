"""Figures of a merge, from the factors alone: no dense ΔW."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor

from .coefficients import Coefficients
from .lora_set import Factors, Layer, LoRASet, column_grams

_ZERO = 1e-6  # a coefficient below this owns no column


def column_cosines(a: Factors, b: Factors, m_a: Tensor, m_b: Tensor) -> Tensor:
    """cos(ΔW_a[:, j]·m_a[j], ΔW_b[:, j]·m_b[j]) for each column j of two LoRAs' updates of a layer, float64 (columns,).

    Zero where a coefficient is (near) zero or a column is zero.
    """
    grams = column_grams([a, b], torch.float64)
    norms = grams.diagonal(dim1=1, dim2=2).clamp_min(0).prod(1).sqrt()
    cosines = torch.where(norms > 0, grams[:, 0, 1] / norms.clamp_min(1e-300), norms * 0)
    signs = torch.sign(m_a.double() * m_b.double())
    owned = (m_a.abs() > _ZERO) & (m_b.abs() > _ZERO)
    return cosines * torch.where(owned, signs, torch.zeros_like(signs))


def _over_pairs(loras: LoRASet, of_two: Callable[[str, Layer, str, str], float]) -> dict[str, float]:
    """For each layer that several LoRAs change: the mean of a figure over each two of them."""
    means = {}
    for name, layer in loras.layers.items():
        figures = [of_two(name, layer, a, b) for a, b in combinations(layer, 2)]
        if figures:
            means[name] = sum(figures) / len(figures)
    return means


def column_alignment(loras: LoRASet, coefficients: Coefficients) -> dict[str, float]:
    """Mean column alignment of each layer that several LoRAs change, of each two (arXiv 2311.13600, Fig. 3b)."""

    def of_two(name: str, layer: Layer, a: str, b: str) -> float:
        return column_cosines(layer[a], layer[b], coefficients[a][name], coefficients[b][name]).mean().item()

    return _over_pairs(loras, of_two)


def column_interference(loras: LoRASet, coefficients: Coefficients) -> dict[str, float]:
    """Mean of |cos · m_i · m_j| over the columns of each layer that several LoRAs change, of each two.

    The paper's Fig. 3b, weighted: scaling a column does not turn it, so that its cosine alone only changes at zero.
    For the direct merge this is the mean |cosine|; 0 where no column is left to two of them.
    """
    ones = Coefficients.ones(loras)

    def of_two(name: str, layer: Layer, a: str, b: str) -> float:
        weights = (coefficients[a][name] * coefficients[b][name]).double()
        cosines = column_cosines(layer[a], layer[b], ones[a][name], ones[b][name])
        return (cosines * weights).abs().mean().item()

    return _over_pairs(loras, of_two)


def sampled_elements(loras: LoRASet, concept: str, rows: int = 16, seed: int = 0) -> Tensor:
    """Elements of one LoRA's ΔW (arXiv 2311.13600, Fig. 3a): some rows of each layer, whole; float32, 1-D.

    Repeatable for a seed; empty where the LoRA changes nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    samples = [torch.empty(0)]
    for layer in loras.layers.values():
        factors = layer.get(concept)
        if factors is not None:
            chosen = torch.randperm(factors.up.shape[0], generator=generator)[:rows]
            up = factors.up.float()[chosen] * factors.scale
            samples.append((up @ factors.down.float().flatten(1)).flatten())
    return torch.cat(samples)


def energy_share(elements: Tensor, top: float) -> float:
    """Share of Σ x² that the largest `top` of the elements hold, 0 to 1; 0 for zeros."""
    squares = elements.double().square()
    whole = squares.sum().item()
    count = max(1, round(top * squares.numel())) if squares.numel() else 0
    return squares.topk(count).values.sum().item() / whole if whole else 0.0
