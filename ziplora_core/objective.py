"""What a merge costs: readings of Eq. 3 of ZipLoRA (arXiv 2311.13600)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def norm(student: Tensor, teacher: Tensor) -> Tensor:
    """‖D(x, p; merged) − D(x, p; own LoRA)‖₂, the norm of each row, averaged over rows (Eq. 3, unsquared).

    student, teacher: (rows, ...) raw network outputs for the same noisy latents, timesteps and prompt.
    Returns a scalar in the dtype of the difference.
    """
    rows: Tensor = torch.linalg.vector_norm((student - teacher).flatten(1), dim=1)
    return rows.mean()


def summed_dot_products(one: Tensor, other: Tensor, sizes: Sequence[int]) -> Tensor:
    """Σ over layers of |m_i · m_j|, the dot product of a layer's two coefficient vectors (Eq. 3 to the letter).

    one, other: (columns,) coefficients of the columns that both LoRAs change, layer after layer.
    sizes: columns of each of these layers. Returns a scalar.
    """
    layers = torch.split(one * other, list(sizes))
    return torch.stack([layer.sum() for layer in layers]).abs().sum()


def overlap_percent(one: Tensor, other: Tensor, sizes: Sequence[int]) -> Tensor:
    """Mean of |m_i ⊙ m_j| over all columns, in percent: 100 at the direct merge, 0 where no column is left to both.

    So with the paper's λ = 0.01 the overlap weighs 1 at the start, as much as one relative retention.
    """
    return 100 * (one * other).abs().mean()


@dataclass(frozen=True)
class Objective:
    """One reading of Eq. 3: L = Σ_i retention(concept i) + λ · Σ_{i<j} overlap(i, j); the paper has two concepts.

    relative: each retention is divided by its value at the direct merge, so that all concepts weigh the same
    and λ means the same for every model, latent size and LoRA strength.
    """

    name: str
    retention: Callable[[Tensor, Tensor], Tensor]
    overlap: Callable[[Tensor, Tensor, Sequence[int]], Tensor]
    relative: bool


BALANCED = Objective("balanced", norm, overlap_percent, relative=True)
PAPER = Objective("paper", norm, summed_dot_products, relative=False)
OBJECTIVES = {objective.name: objective for objective in (BALANCED, PAPER)}
