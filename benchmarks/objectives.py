"""Terms of a merge's objective that other code uses, to compare the pack's own with. Torch alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mean_square(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference over everything: what other code uses in the place of Eq. 3's norms."""
    return (student - teacher).square().mean()


def summed_mean_products(one: Tensor, other: Tensor, sizes: Sequence[int]) -> Tensor:
    """Σ over layers of mean |m_i ⊙ m_j|: the community training script's."""
    layers = torch.split((one * other).abs(), list(sizes))
    return torch.stack([layer.mean() for layer in layers]).sum()
