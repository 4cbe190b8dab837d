"""A LoRA of its largest elements alone (arXiv 2311.13600, Fig. 3a and the supplement's Fig. 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from .lora_set import Factors


def top_elements(factors: Factors, share: float) -> tuple[Tensor, float]:
    """ΔW with all but its largest elements by magnitude set to zero, and the share of ‖ΔW‖² that they hold.

    share: of the elements, above 0 to 1; at least one is kept. Returns ΔW (out, in, *kernel) float32: what is left of
    it is of no low rank.
    """
    delta = (factors.up.float() * factors.scale) @ factors.down.float().flatten(1)
    count = max(1, round(share * delta.numel()))
    squares = delta.square()
    whole = squares.sum(dtype=torch.float64).item()
    if count < delta.numel():
        kept = squares.flatten().topk(count, sorted=False).indices
        sparse = torch.zeros_like(delta)
        sparse.view(-1)[kept] = delta.view(-1)[kept]
        delta = sparse
    held = delta.square().sum(dtype=torch.float64).item()
    return delta.reshape(factors.shape), held / whole if whole else 1.0
