"""A merge without backpropagation: columns go to the LoRA under whose reference their input feature is active.

A few forward passes, in which each reference's rows see their own LoRA alone, give E_r[x²] of each input feature of
each layer under each reference; with these `shares` has each layer's coefficients in closed form. What is kept between
passes is one number for each coefficient, and no pass has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import shares
from .branch import Branch, JoinedSet
from .coefficients import Coefficients
from .draws import spread_batches
from .frozen import Base
from .shares import SolvedLayer
from .solver import Predictor, References, Settings

DRAWS = 8  # passes over the references, spread over the timesteps
_SEED = 0x1A7E  # added to the seed: noise apart from training's and from measuring's


@dataclass
class Sums:
    """What is added up of a layer's rows under each reference: sums by layer and concept, and of how many rows."""

    sums: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    counts: dict[tuple[str, str], int] = field(default_factory=dict)

    def put(self, name: str, concept: str, part: Tensor, count: int) -> None:
        key = (name, concept)
        self.sums[key] = self.sums[key] + part if key in self.sums else part
        self.counts[key] = self.counts.get(key, 0) + count

    def has(self, name: str, concepts: Iterable[str]) -> bool:
        """Whether a layer took part in a pass of each of them."""
        return all((name, concept) in self.sums for concept in concepts)


class Activity(Sums):
    """E_r[x²] of what layers see: sums (columns,) float32."""

    def add(self, name: str, concept: str, x: Tensor) -> None:
        """x: (..., columns), of any dtype; added up in float32."""
        rows = x.flatten(0, -2)
        wide = torch.promote_types(x.dtype, torch.float32)
        self.put(name, concept, torch.linalg.vector_norm(rows, dim=0, dtype=wide).square().float(), len(rows))

    def of(self, name: str, concepts: list[str]) -> Tensor | None:
        """(columns, concepts) of a layer; None where it took no part in a pass of theirs."""
        if not self.has(name, concepts):
            return None
        return torch.stack([self.sums[name, c] / self.counts[name, c] for c in concepts], dim=1)


class RecordingBranch(Branch):
    """A teacher that adds up how active the features are that its layers see."""

    def __init__(self, joined: JoinedSet, concept_index: Tensor, activity: Activity):
        super().__init__(joined.layers, rows=joined.rows(concept_index))
        self._activity = activity

    def layer(self, name: str, x: Tensor, base: Base, **convolution: Any) -> Tensor:
        layer = self._layers[name]
        for concept, mine in self.own(x).items():
            if len(mine):
                features = mine if layer.down.ndim == 2 else mine.movedim(1, -1)
                self._activity.add(name, concept, features)
        return super().layer(name, x, base, **convolution)


def teach(
    predictor: Predictor, references: References, seed: int, teacher: Callable[[Tensor], Branch], draws: int = DRAWS
) -> None:
    """Passes over the references, `draws` of them, on noise that neither training nor measuring sees. What a predictor
    raises ends them. teacher: a batch's concept_index -> its branch."""
    for batches in spread_batches(references, predictor, seed + _SEED, draws):
        for batch in batches:
            predictor(batch, teacher(batch.concept_index))


def record(joined: JoinedSet, predictor: Predictor, references: References, seed: int, draws: int = DRAWS) -> Activity:
    """Teacher passes that add up how active features are."""
    activity = Activity()
    teach(predictor, references, seed, lambda index: RecordingBranch(joined, index, activity), draws)
    return activity


def merge(
    joined: JoinedSet,
    predictor: Predictor,
    references: References,
    seed: int,
    on_layer: Callable[[SolvedLayer], None] | None = None,
    ridge: float = Settings.ridge,
) -> Coefficients:
    """The coefficients of every layer, from `DRAWS` passes over the references and the LoRAs' own columns.

    A layer that took no part in a pass is shared out by the weights alone. `on_layer` is called after each layer; what
    it or the predictor raises ends the run. Deterministic for a seed. Raises FloatingPointError where a layer's numbers
    are not finite.
    """
    device = shares.device_of_float64(joined.device)
    with torch.inference_mode(False), torch.no_grad():
        activity = record(joined, predictor, references, seed)
    return shares.merge(joined.loras, ridge, lambda name, layer: activity.of(name, list(layer)), on_layer, device)
