"""DoRA on the output axis as those compute it who train it: peft, diffusers, LyCORIS, OneTrainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.lora
import torch
from torch import Tensor

from .adapters import all_used, scale_of, turns_nothing, without_scale


def row_scale(patch: Any, shape: torch.Size) -> Tensor | None:
    """The scale of a patch of the host where it is one number for each row of its weight; None for any other."""
    scale = scale_of(patch)
    return scale if scale is not None and scale.ndim and scale.shape[0] == shape[0] == scale.numel() else None


def update(
    patch: Any, magnitude: Tensor, weight: Tensor, key: str, turned: Callable[[Tensor], Tensor] | None = None
) -> Tensor | None:
    """m · (W + ΔW) / ‖W + ΔW‖, each row by itself, minus W (arXiv 2402.09353, eq. 5); None where it does not fit, of
    which the host only writes a line into its log.

    The host divides by ‖W‖ instead, where it reads such a scale at all.

    patch: the host's, whose update ΔW is meant without its own scale. magnitude: m, as many numbers as W has rows.
    weight: W (out, in, *kernel) on the CPU. turned: swaps rows between the file's order and the host's, both ways.
    """
    if magnitude.numel() != weight.shape[0]:
        return None
    before, patch = (weight if turned is None else turned(weight)).double(), without_scale(patch)
    after = comfy.lora.calculate_weight([(1.0, patch, 1.0, None, None)], before.clone(), key, torch.float64)
    if after.shape != before.shape or (torch.equal(after, before) and all_used(patch) and not turns_nothing(patch)):
        return None
    rows = after.flatten(1)
    norms = rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    rows = rows * (magnitude.double().reshape(-1, 1).to(rows.device) / norms)
    delta = (rows.reshape(before.shape) - before).float()
    return delta if turned is None else turned(delta)
