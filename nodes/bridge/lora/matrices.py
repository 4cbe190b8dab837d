"""Factors of one layer: of the host's adapter, shaped for a weight, widened from a slice of it, two of them added."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from comfy.weight_adapter import LoRAAdapter

from ....ziplora_core.lora_set import Factors
from . import refusals
from .loras import LoRASource


def low_rank(source: LoRASource, layer: str, adapter: LoRAAdapter) -> Factors:
    """The host's adapter of one layer as up (out, r) and down (r, in, *kernel), at its file's strength.

    Tucker convolutions are written out. Raises LoRAFileError where the two matrices do not multiply.
    """
    up, down, alpha, mid, *_ = adapter.weights
    if min(up.ndim, down.ndim) < 2 or not down.shape[0]:
        raise refusals.broken(source, layer, f"up {tuple(up.shape)} and down {tuple(down.shape)} are no two matrices")
    up, down = (m if m.is_floating_point() else m.float() for m in (up, down))
    if mid is not None:  # down'[p, in, kernel] = Σ_q mid[p, q, kernel] · down[q, in]
        down = torch.einsum("pq...,qi->pi...", mid.float(), down.flatten(1).float())
    try:
        return Factors(up.flatten(1), down, source.strength * (1.0 if alpha is None else alpha / down.shape[0]))
    except ValueError as error:
        raise refusals.broken(source, layer, str(error)) from error


def reshaped(source: LoRASource, key: str, factors: Factors, shape: torch.Size) -> Factors:
    """Factors for a weight of this shape: some files store a 1 x 1 convolution as a linear layer, or the reverse."""
    columns = factors.down.numel() // factors.rank
    if factors.up.shape[0] != shape[0] or columns != math.prod(shape[1:]):
        raise refusals.OtherModelError(
            f"'{source.title}' was made for another model{refusals.guess(source)}: its layer '{key}' changes a weight "
            f"of shape ({factors.up.shape[0]}, {columns}), this model's is {tuple(shape)}; "
            "choose a LoRA of the same model family"
        )
    return replace(factors, down=factors.down.reshape(factors.rank, *shape[1:]))


def widened(factors: Factors, shape: torch.Size, axis: int, start: int, length: int) -> Factors:
    """An update of a slice as one of the whole fused weight: zeros in the other rows (axis 0) or columns (1)."""
    side = factors.up if axis == 0 else factors.down
    size = list(side.shape)
    size[axis] = shape[axis]
    whole = side.new_zeros(size)
    whole.narrow(axis, start, length).copy_(side)
    return replace(factors, up=whole) if axis == 0 else replace(factors, down=whole)


def side_by_side(a: Factors, b: Factors) -> Factors:
    """The sum of two updates of one weight, exactly: ranks add up, but of two that are ΔW itself."""
    if a.up is b.up:
        if a.scale == b.scale:
            return replace(a, down=a.down + b.down)
        down = a.scale * a.down.float() + b.scale * b.down.float()
        return Factors(a.up, down.to(a.down.dtype))
    return Factors(
        torch.cat([f.up.float() * f.scale for f in (a, b)], dim=1), torch.cat([f.down.float() for f in (a, b)])
    )
