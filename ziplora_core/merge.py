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
    Returns up (out, r_c + r_s) and down (r_c + r_s, in, *kernel) in float32 (float64 where the factors are).
    Differentiable in the coefficients. Raises ValueError where a vector's length is not the layer's columns.
    """
    chosen = {"content": content, "style": style}
    ups, downs = [], []
    for concept, factors in layer.halves():
        dtype = torch.float64 if factors.down.dtype == torch.float64 else torch.float32
        down = factors.down.to(dtype)
        coefficients = chosen[concept]
        if coefficients is not None:
            if coefficients.numel() != factors.columns:
                raise ValueError(
                    f"{concept} has {factors.columns} columns in this layer but {coefficients.numel()} coefficients"
                )
            down = down * column_view(coefficients.to(down), down)
        ups.append(factors.scale * factors.up.to(dtype))
        downs.append(down)
    return torch.cat(ups, dim=1), torch.cat(downs, dim=0)


def merged_layers(pair: LoRAPair, coefficients: Coefficients) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(layer name, up, down) of every layer of the zipped pair: for application and export."""
    for name, layer in pair.layers.items():
        yield name, *merged_factors(layer, coefficients.content.get(name), coefficients.style.get(name))
