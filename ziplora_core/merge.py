"""The identity that the pack rests on: LoRAs zipped together are one LoRA of the sum of their ranks, exactly."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .lora_set import Factors, Layer, column_view, on_one_up


def merged_factors(layer: Layer, coefficients: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """ΔW_m = Σ_i ΔW_i·diag(m_i) (arXiv 2311.13600, Eq. 2, there for two) as one LoRA without an SVD.

        up = [ s_1·B_1 | … | s_n·B_n ]        down = [ A_1·diag(m_1) ; … ; A_n·diag(m_n) ]

    coefficients: concept -> (columns,); read only where the layer has that LoRA, all ones where there is none.
    Returns new up (out, Σ r_i) and down (Σ r_i, in, *kernel) in float32 (float64 where the factors are).
    Raises ValueError where a vector's length is not the layer's columns.
    """
    first = next(iter(layer.values()))
    out, *columns = first.shape
    rank = sum(factors.rank for factors in layer.values())
    dtype = _precision(first)
    up, down = (torch.empty(s, dtype=dtype, device=first.down.device) for s in ((out, rank), (rank, *columns)))
    start = 0
    for concept, factors in layer.items():
        part = slice(start, start + factors.rank)
        start += factors.rank
        up[:, part].copy_(factors.up)
        if factors.scale != 1:
            up[:, part].mul_(factors.scale)
        down[part].copy_(factors.down)
        m = _checked(concept, factors, coefficients)
        if m is not None:
            down[part].mul_(column_view(m.to(down), down))
    return up, down


def one_lora(layer: Layer, coefficients: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """As `merged_factors`, but updates on one and the same up stay on it, exactly: rank r instead of n · r.

    up = B        down = Σ_i s_i·A_i·diag(m_i)
    """
    if not on_one_up(layer):
        return merged_factors(layer, coefficients)
    first = next(iter(layer.values()))
    dtype = _precision(first)
    down = torch.zeros(first.down.shape, dtype=dtype, device=first.down.device)
    for concept, factors in layer.items():
        m = _checked(concept, factors, coefficients)
        part = factors.down.to(dtype)
        down.add_(part if m is None else part * column_view(m.to(down), down), alpha=factors.scale)
    return first.up.to(dtype, copy=True), down


def _precision(factors: Factors) -> torch.dtype:
    return torch.float64 if factors.down.dtype == torch.float64 else torch.float32


def _checked(concept: str, factors: Factors, coefficients: Mapping[str, Tensor] | None) -> Tensor | None:
    """Its coefficients, None for ones. Raises ValueError where their number is not the layer's columns."""
    m = None if coefficients is None else coefficients.get(concept)
    if m is not None and m.numel() != factors.columns:
        raise ValueError(f"{concept} has {factors.columns} columns in this layer but {m.numel()} coefficients")
    return m
