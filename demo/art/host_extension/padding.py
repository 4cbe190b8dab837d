"""TAESD weights without their zeros <-> the 64-wide layout. Imports torch only."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

WIDTH = 64
KEPT = (3, 4)  # picture and latent channels are never padded
ENCODER_BLOCKS = (1, 3, 4, 5, 7, 8, 9, 11, 12, 13)
DECODER_BLOCKS = (3, 4, 5, 8, 9, 10, 13, 14, 15, 18)


def _missing(count: int) -> int:
    return 0 if count in KEPT else WIDTH - count


def _pad(value: Tensor) -> Tensor:
    if value.dim() == 1:
        return F.pad(value, (0, _missing(value.shape[0])))
    if value.dim() == 4:
        return F.pad(value, (0, 0, 0, 0, 0, _missing(value.shape[1]), 0, _missing(value.shape[0])))
    return value


def widen(narrow: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pads every weight with zeros to 64 channels and adds the left-out residual blocks, all zero.

    A residual block of zeros returns its non-negative input unchanged, so the function stays the same, exactly.
    Weights that are already 64 wide pass through.
    """
    full = {name: _pad(value) for name, value in narrow.items()}
    dtype = next(iter(narrow.values())).dtype if narrow else torch.float32
    for part, blocks in (("taesd_encoder", ENCODER_BLOCKS), ("taesd_decoder", DECODER_BLOCKS)):
        for block in blocks:
            for layer in (0, 2, 4):
                key = f"{part}.{block}.conv.{layer}"
                full.setdefault(f"{key}.weight", torch.zeros(WIDTH, WIDTH, 3, 3, dtype=dtype))
                full.setdefault(f"{key}.bias", torch.zeros(WIDTH, dtype=dtype))
    return full
