"""Textual Inversion (arXiv 2208.01618): one word's vectors, trained; the network and the text encoders are frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import training
from .checks import Range
from .frozen import Base, frozen
from .training import Adapted, Rows


@dataclass(frozen=True)
class Settings(training.Settings):
    """The defaults are the paper's (Sec. 4, implementation details). vectors: that the word stands for."""

    steps: int = 5000
    learning_rate: float = 5e-3
    rank: int = 1
    vectors: int = 1

    ranges: ClassVar[Mapping[str, Range]] = {**training.Settings.ranges, "vectors": Range(1, 64)}


class TrainedEmbedding(training.Plain):
    """rows: text encoder -> (vectors, width), float32 and trained. start: what they are at first."""

    def __init__(self, start: Mapping[str, Tensor], device: torch.device | str = "cpu"):
        self.rows = {key: t.detach().to(device, torch.float32, copy=True).requires_grad_() for key, t in start.items()}

    def tensors(self) -> list[Tensor]:
        return list(self.rows.values())

    def branch(self, rows: Rows | None = None) -> Adapted:
        return _Unchanged()

    def largest(self) -> None:
        """No layer of the network is changed."""
        return None

    @torch.no_grad()
    def learned(self) -> dict[str, Tensor]:
        """Copies on the CPU."""
        return {key: rows.detach().cpu().clone() for key, rows in self.rows.items()}


class _Unchanged:
    def layer(self, name: str, x: Tensor, base: Base, **_: Any) -> Tensor:
        return frozen(x, base)
