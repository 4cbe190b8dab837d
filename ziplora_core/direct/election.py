"""The three steps of TIES (arXiv 2306.01708, section 4, Algorithm 1), on any matrices that lie in one space."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

SHARE = 0.2  # the paper's top-k without a validation set, and its λ
SCALE = 1.0
_LOW = 16  # bits of a float32 that the second pass counts


def _bits(part: Tensor) -> Tensor:
    """Magnitudes of float32 numbers as integers of the same order."""
    return part.abs().flatten().view(torch.int32)


def _place(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The bin that holds the wanted-th largest number, and which one of its own it is."""
    above = counts.flip(0).cumsum(0)
    place = int((above < wanted).sum())
    return len(counts) - 1 - place, wanted - (int(above[place - 1]) if place else 0)


def least_kept(parts: Callable[[], Iterable[Tensor]], share: float = SHARE) -> float:
    """Trim: the smallest magnitude among the `share` largest of a whole task vector, exactly.

    parts: gives the vector anew at each call, in float32 pieces, of which one at a time is held: the numbers are
    counted by their upper bits, then those of one bin by their lower. Raises ValueError for an empty vector.
    """
    upper = torch.zeros(2 ** (31 - _LOW), dtype=torch.int64)
    for part in parts():
        upper += torch.bincount(_bits(part) >> _LOW, minlength=len(upper))
    total = int(upper.sum())
    if not total:
        raise ValueError("there is nothing to trim: the LoRA changes no layer")
    high, wanted = _place(upper, max(1, int(share * total)))
    lower = torch.zeros(2**_LOW, dtype=torch.int64)
    for part in parts():
        bits = _bits(part)
        lower += torch.bincount(bits[bits >> _LOW == high] & (2**_LOW - 1), minlength=len(lower))
    low, _ = _place(lower, wanted)
    return torch.tensor(high << _LOW | low, dtype=torch.int32).view(torch.float32).item()


def elected(parts: Sequence[Tensor], least: Sequence[float], scale: float = SCALE) -> list[Tensor]:
    """What each LoRA has in the merge, which is their sum: λ · trimmed_i / |A| where i is in A, 0 elsewhere.

    A: of an element, the LoRAs whose trimmed value has the sign of the sum of all. parts: one for each LoRA, of one
    shape. least: `least_kept` of each.
    """
    trimmed = torch.stack([part * (part.abs() >= low) for part, low in zip(parts, least, strict=True)])
    agree = (trimmed.sign() == trimmed.sum(0).sign()) & (trimmed != 0)
    return list(trimmed.mul_(agree).mul_(scale).div_(agree.sum(0).clamp_min_(1)).unbind(0))
