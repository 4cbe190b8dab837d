"""Mixtures of experts with rows that stay rows: a teacher's LoRA is its rows' own, and shapes depend on no number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_MIXTURES = ("MOEFeedForwardSwiGLU",)  # HiDream's


def is_mixture(module: torch.nn.Module) -> bool:
    return type(module).__name__ in _MIXTURES


def over_all(module: Any) -> Callable[[Tensor], Tensor]:
    """The forward of a mixture that hands each expert every token, and weighs by zero what the gate gives to others.

    The host hands each expert the tokens that are its own, of all rows together. x: (rows, tokens, width).
    """

    def run(x: Tensor) -> Tensor:
        chosen, weights, _ = module.gate(x)
        shares = weights.new_zeros(len(weights), len(module.experts)).scatter(1, chosen, weights)
        y = module.shared_experts(x)
        for expert, share in zip(module.experts, shares.unbind(1), strict=True):
            y = y + expert(x) * share.view(*x.shape[:-1], 1).to(x.dtype)
        return y

    return run
