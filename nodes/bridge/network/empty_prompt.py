"""A prompt emptied."""

from __future__ import annotations

import torch


def zeros(conditioning: list) -> list:
    """A prompt with all its numbers set to zero, as Conditioning Zero Out does it."""
    pairs = []
    for context, options in conditioning:
        pooled = options.get("pooled_output")
        zeroed = {**options, "pooled_output": torch.zeros_like(pooled)} if pooled is not None else dict(options)
        pairs.append([torch.zeros_like(context), zeroed])
    return pairs
