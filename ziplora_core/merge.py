"""The identity that the pack rests on: a zipped pair is a LoRA of rank r_c + r_s, exactly."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .coefficients import Coefficients
from .pair import LayerPair, LoRAPair, column_view


def merged_factors(layer: LayerPair, content: Tensor | None, style: Tensor | None) -> tuple[Tensor, Tensor]:
    """ΔW_m = ΔW_c·diag(m_c) + ΔW_s·diag(m_s) (arXiv 2311.13600, Eq. 2) as one LoRA without an SVD.

        up = [ s_c·B_c | s_s·B_s ]        down = [ A_c·diag(m_c) ; A_s·diag(m_s) ]

    content, style: (columns,); read only where the layer has that LoRA, None stands for all ones.
    Returns new up (out, r_c + r_s) and down (r_c + r_s, in, *kernel) in float32 (float64 where the factors are).
    Raises ValueError where a vector's length is not the layer's columns.
    """
    chosen = {"content": content, "style": style}
    halves = list(layer.halves())
    out, *columns = halves[0][1].shape
    rank = sum(factors.rank for _, factors in halves)
    like = halves[0][1].down
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    up, down = (torch.empty(s, dtype=dtype, device=like.device) for s in ((out, rank), (rank, *columns)))
    start = 0
    for concept, factors in halves:
        part = slice(start, start + factors.rank)
        start += factors.rank
        up[:, part].copy_(factors.up)
        if factors.scale != 1:
            up[:, part].mul_(factors.scale)
        down[part].copy_(factors.down)
        coefficients = chosen[concept]
        if coefficients is not None:
            if coefficients.numel() != factors.columns:
                raise ValueError(
                    f"{concept} has {factors.columns} columns in this layer but {coefficients.numel()} coefficients"
                )
            down[part].mul_(column_view(coefficients.to(down), down))
    return up, down


def merged_layers(pair: LoRAPair, coefficients: Coefficients) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(layer name, up, down) of every layer of the zipped pair: for application and export."""
    for name, layer in pair.layers.items():
        yield name, *merged_factors(layer, coefficients.content.get(name), coefficients.style.get(name))
