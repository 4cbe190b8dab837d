"""Custom Diffusion's training (arXiv 2212.04488, Sec. 3.2): whole updates of layers, and the concepts' words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import training
from .frozen import Base, frozen
from .trained_embedding import TrainedEmbedding
from .training import Adapted, Rows


@dataclass(frozen=True)
class Settings(training.Settings):
    """The defaults are the paper's (Sec. 4). learning_rate: for each picture of a step; Adam's is as many times it."""

    steps: int = 250
    learning_rate: float = 1e-5
    rank: int = 1
    batch_size: int = 8


class TrainedWeights(training.Plain):
    """updates: layer -> ΔW (out, in), float32, zero at first. words: of each concept.

    shapes: layer -> (out, in). scale: of the learning rate, the pictures of a step.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        words: Sequence[TrainedEmbedding],
        scale: float = 1.0,
        device: torch.device | str = "cpu",
    ):
        self.updates = {name: torch.zeros(shape, device=device, requires_grad=True) for name, shape in shapes.items()}
        self.words, self._scale = list(words), scale

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        return super().groups(learning_rate * self._scale)

    def tensors(self) -> list[Tensor]:
        return [*self.updates.values(), *(rows for word in self.words for rows in word.tensors())]

    def branch(self, rows: Rows | None = None) -> Adapted:
        return _Branch(self)

    @torch.no_grad()
    def largest(self) -> str | None:
        sizes = {name: float(torch.linalg.norm(update)) for name, update in self.updates.items()}
        sizes = {name: size if math.isfinite(size) else math.inf for name, size in sizes.items()}
        return max(sizes, key=sizes.__getitem__) if any(sizes.values()) else None

    @torch.no_grad()
    def learned(self) -> dict[str, Tensor]:
        """Copies of the updates on the CPU."""
        return {name: update.detach().cpu().clone() for name, update in self.updates.items()}


class _Branch:
    def __init__(self, trained: TrainedWeights):
        self._updates = trained.updates

    def layer(self, name: str, x: Tensor, base: Base, **_: Any) -> Tensor:
        return frozen(x, base) + F.linear(x, self._updates[name].to(x.dtype))
