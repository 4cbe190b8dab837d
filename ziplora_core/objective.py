"""Eq. 3 of ZipLoRA (arXiv 2311.13600): what a merge costs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def retention(student: Tensor, teacher: Tensor) -> Tensor:
    """‖D(x, p; merged) − D(x, p; own LoRA)‖₂, the norm of each row, averaged over rows (Eq. 3, unsquared).

    student, teacher: (rows, ...) raw network outputs for the same noisy latents, timesteps and prompt.
    Returns a scalar in the dtype of the difference.
    """
    rows: Tensor = torch.linalg.vector_norm((student - teacher).flatten(1), dim=1)
    return rows.mean()


def overlap(layers: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Σ over layers of |m_c · m_s|, the dot product of a layer's two coefficient vectors (Eq. 3).

    layers: (m_c, m_s) of every layer that both LoRAs change. Returns a scalar; a float 0 tensor for no layers.
    """
    terms = [torch.dot(content, style).abs() for content, style in layers]
    return torch.stack(terms).sum() if terms else torch.zeros(())
