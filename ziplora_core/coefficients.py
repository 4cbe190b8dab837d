"""Merger coefficients: one number for each column of each LoRA's update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .pair import LoRAPair

OWNERS = ("content", "style", "both", "neither")


@dataclass(frozen=True)
class Coefficients:
    """m_c and m_s of ZipLoRA (arXiv 2311.13600, Eq. 2): layer name -> float32 vector (columns,).

    A layer that only one LoRA changes has an entry on that side alone.
    """

    content: Mapping[str, Tensor]
    style: Mapping[str, Tensor]

    @classmethod
    def ones(cls, pair: LoRAPair) -> Coefficients:
        """The start of the optimisation: all ones, which is the direct merge (Eq. 1)."""
        return cls(
            content={k: torch.ones(v.columns) for k, v in pair.layers.items() if v.content is not None},
            style={k: torch.ones(v.columns) for k, v in pair.layers.items() if v.style is not None},
        )

    @property
    def count(self) -> int:
        return sum(m.numel() for m in (*self.content.values(), *self.style.values()))

    def scaled(self, content: float = 1.0, style: float = 1.0) -> Coefficients:
        """w_c · m_c and w_s · m_s (the paper's style control, Fig. 7a). Costs nothing, keeps the original."""
        return Coefficients(
            content={k: m * content for k, m in self.content.items()},
            style={k: m * style for k, m in self.style.items()},
        )

    def most_changed(self, since: Coefficients) -> tuple[str, str, float]:
        """(concept, layer, by how much) of the coefficient that has moved furthest; ("", "", 0.0) where none has."""
        found = ("", "", 0.0)
        for concept, now, before in (("content", self.content, since.content), ("style", self.style, since.style)):
            for name, m in now.items():
                by = (m - before[name]).abs().max().item()
                found = (concept, name, by) if by > found[2] else found
        return found

    def overlap(self) -> float:
        """Mean of |m_c ⊙ m_s| over the columns that both LoRAs change: 1 for the direct merge, 0 for a closed zip."""
        total, columns = 0.0, 0
        for name in self.content.keys() & self.style.keys():
            product = self.content[name] * self.style[name]
            total += float(product.abs().sum(dtype=torch.float64))
            columns += product.numel()
        return total / columns if columns else 0.0

    def ownership(self, threshold: float = 0.5) -> dict[str, float]:
        """Share of the columns that both LoRAs change which end with content, style, both or neither.

        A concept owns a column where its |coefficient| is at least `threshold`.
        """
        layers = self.ownership_by_layer(threshold)
        columns = sum(self.content[name].numel() for name in layers)
        return {
            owner: sum(shares[owner] * self.content[name].numel() for name, shares in layers.items()) / max(columns, 1)
            for owner in OWNERS
        }

    def ownership_by_layer(self, threshold: float = 0.5) -> dict[str, dict[str, float]]:
        """The same for each layer that both LoRAs change, in the pair's order."""
        found = {}
        for name in self.content:
            if name in self.style:
                content, style = (side[name].abs() >= threshold for side in (self.content, self.style))
                masks = (content & ~style, style & ~content, content & style, ~content & ~style)
                shares = (mask.float().mean().item() for mask in masks)
                found[name] = dict(zip(OWNERS, shares, strict=True))
        return found
