"""Merger coefficients: one number for each column of each LoRA's update."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from .lora_set import LoRASet


def owners(concepts: Iterable[str]) -> tuple[str, ...]:
    """Who may own a column that several LoRAs change: one concept, more of them ("both", where they are two), none."""
    names = tuple(concepts)
    return (*names, "both" if len(names) == 2 else "several", "neither")


@dataclass(frozen=True)
class Coefficients:
    """The mergers m of ZipLoRA (arXiv 2311.13600, Eq. 2): concept -> layer name -> float32 vector (columns,).

    A layer that a LoRA leaves alone has no entry under its concept.
    """

    by_concept: Mapping[str, Mapping[str, Tensor]]

    def __getitem__(self, concept: str) -> Mapping[str, Tensor]:
        return self.by_concept[concept]

    @classmethod
    def ones(cls, loras: LoRASet) -> Coefficients:
        """The start of the optimization: all ones, which is the direct merge (Eq. 1)."""
        return cls(
            {
                concept: {name: torch.ones(f[concept].columns) for name, f in loras.layers.items() if concept in f}
                for concept in loras.concepts
            }
        )

    def of_layer(self, name: str) -> dict[str, Tensor]:
        """Concept -> (columns,) of one layer."""
        return {concept: by_layer[name] for concept, by_layer in self.by_concept.items() if name in by_layer}

    def scaled(self, /, **strengths: float) -> Coefficients:
        """w · m by concept, 1 where none is given (the paper's style control, Fig. 7a). Costs nothing, keeps the
        original. Raises ValueError for a concept that is not there."""
        unknown = [concept for concept in strengths if concept not in self.by_concept]
        if unknown:
            raise ValueError(f"there is no concept '{unknown[0]}'; there are: {', '.join(self.by_concept)}")
        return Coefficients(
            {
                concept: {name: m * strengths.get(concept, 1.0) for name, m in by_layer.items()}
                for concept, by_layer in self.by_concept.items()
            }
        )

    def most_changed(self, since: Coefficients) -> tuple[str, str, float]:
        """(concept, layer, by how much) of the coefficient that has moved furthest; ("", "", 0.0) where none has."""
        furthest = ("", "", 0.0)
        for concept, by_layer in self.by_concept.items():
            for name, m in by_layer.items():
                by = (m - since[concept][name]).abs().max().item()
                furthest = (concept, name, by) if by > furthest[2] else furthest
        return furthest

    def overlap(self) -> float:
        """Mean of |m_i ⊙ m_j| over each two concepts and the columns that both change: 1 for the direct merge, 0 where
        no column is left to two of them."""
        total, columns = 0.0, 0
        for one, other in combinations(self.by_concept.values(), 2):
            for name in one:
                if name in other:
                    product = one[name] * other[name]
                    total += float(product.abs().sum(dtype=torch.float64))
                    columns += product.numel()
        return total / columns if columns else 0.0

    def ownership(self, threshold: float = 0.5) -> dict[str, float]:
        """Share of the columns that several LoRAs change which end with each of `owners`.

        A concept owns a column where its |coefficient| is at least `threshold`.
        """
        layers = self.ownership_by_layer(threshold)
        sizes = {name: next(iter(self.of_layer(name).values())).numel() for name in layers}
        return {
            owner: sum(shares[owner] * sizes[name] for name, shares in layers.items()) / max(sum(sizes.values()), 1)
            for owner in owners(self.by_concept)
        }

    def ownership_by_layer(self, threshold: float = 0.5) -> dict[str, dict[str, float]]:
        """As `ownership`, of each layer that several LoRAs change, in the set's order."""
        *_, several, neither = owners(self.by_concept)
        by_layer = {}
        for name in dict.fromkeys(name for vectors in self.by_concept.values() for name in vectors):
            owned = {concept: m.abs() >= threshold for concept, m in self.of_layer(name).items()}
            if len(owned) < 2:
                continue
            count = torch.stack(list(owned.values())).sum(0)
            masks = {concept: mask & (count == 1) for concept, mask in owned.items()}
            masks |= {several: count > 1, neither: count == 0}
            by_layer[name] = {
                owner: masks[owner].float().mean().item() if owner in masks else 0.0
                for owner in owners(self.by_concept)
            }
        return by_layer
