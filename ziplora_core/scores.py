"""The scores of the paper's Table 2: mean cosines between features of pictures, references and prompts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def alignment(features: Tensor, references: Tensor) -> Tensor:
    """Mean cosine of each picture with all references: (pictures,) float32, -1 to 1.

    features: (pictures, d). references: (references, d), d > 0. Raises ValueError where the widths differ.
    """
    if features.shape[1] != references.shape[1]:
        raise ValueError(f"features of {features.shape[1]} and of {references.shape[1]} numbers cannot be compared")
    a, b = (F.normalize(x.float(), dim=1) for x in (features, references))
    return (a @ b.T).mean(dim=1)


def consistency(features: Tensor) -> float:
    """Mean cosine of all pairs of different pictures. features: (pictures, d). Raises ValueError for less than two."""
    count = len(features)
    if count < 2:
        raise ValueError(f"consistency is of two pictures or more, not of {count}")
    a = F.normalize(features.float(), dim=1)
    return ((a @ a.T).triu(diagonal=1).sum() / (count * (count - 1) / 2)).item()


def summary(scores: Mapping[str, Tensor]) -> dict[str, dict[str, object]]:
    """Name -> {"mean", "spread" (standard deviation over pictures, 0 for one), "pictures": each picture's score}."""
    summaries: dict[str, dict[str, object]] = {}
    for name, values in scores.items():
        spread = torch.std(values).item() if len(values) > 1 else 0.0
        summaries[name] = {
            "mean": round(values.mean().item(), 4),
            "spread": round(spread, 4),
            "pictures": [round(value, 4) for value in values.tolist()],
        }
    return summaries
