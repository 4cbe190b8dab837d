"""How far drawn pictures are from true ones without a judge: sliced Wasserstein distances of colors and of structure.

Both compare what occurs in two sets of pictures, wherever in the picture it occurs: an object may be anywhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_DIRECTIONS, _SAMPLES, _PATCH = 64, 16384, 7
_SIDES = (64, 32)  # of the pictures whose patches are compared


def sliced_wasserstein(one: Tensor, two: Tensor, directions: int = _DIRECTIONS, seed: int = 0) -> float:
    """Mean over random directions of the 1-Wasserstein distance of the projections. one, two: (points, dimensions).

    Arbitrary numbers of points. Zero for equal sets; for one shifted by a vector, the mean of its projections' sizes.
    Rabin et al., "Wasserstein barycenter and its application to texture mixing" (2011).
    """
    generator = torch.Generator().manual_seed(seed)
    lines = F.normalize(torch.randn(one.shape[1], directions, generator=generator), dim=0).to(one)
    levels = (torch.arange(1024, device=one.device, dtype=one.dtype) + 0.5) / 1024

    def quantiles(points: Tensor) -> Tensor:
        ranked = (points @ lines).sort(dim=0).values
        return ranked[(levels * len(points)).long().clamp_max(len(points) - 1)]

    return float((quantiles(one) - quantiles(two)).abs().mean())


def _some(points: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return points[torch.randint(len(points), (_SAMPLES,), generator=generator)]


def of_colors(drawn: Tensor, true: Tensor) -> float:
    """Of the pixels' colors, in parts of 255. drawn, true: (pictures, 3, H, W) in 0..1."""
    one, two = (pictures.movedim(1, -1).reshape(-1, 3) for pictures in (drawn, true))
    return 255 * sliced_wasserstein(_some(one, 1), _some(two, 2))


def of_structure(drawn: Tensor, true: Tensor) -> float:
    """Of small patches' brightness, each without its mean, at two sizes: edges, corners, textures; no colors."""
    found = []
    for side in _SIDES:
        patches = []
        for number, pictures in enumerate((drawn, true)):
            gray = F.interpolate(pictures, size=(side, side), mode="area").mean(1, keepdim=True)
            every = F.unfold(gray, _PATCH).movedim(1, 2).flatten(0, 1)
            patches.append(_some(every - every.mean(1, keepdim=True), number))
        found.append(255 * sliced_wasserstein(*patches))
    return sum(found) / len(found)
