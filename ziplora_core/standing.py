"""The state of a training run, copied off the device, so that a second try goes on from there exactly.

A file would not do: it holds the LoRA alone and in half precision, and Adam would start anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .training import Trainable


@dataclass(frozen=True)
class TrainingState:
    """tensors: copies of `Trainable.tensors` on the CPU. adam: the optimizer's `state_dict`, copied likewise."""

    tensors: list[Tensor]
    adam: dict[str, Any]

    @classmethod
    @torch.no_grad()
    def of(cls, trained: Trainable, adam: torch.optim.Adam) -> TrainingState:
        return cls([_copy(t) for t in trained.tensors()], _copy(adam.state_dict()))

    @torch.no_grad()
    def restore(self, trained: Trainable, adam: torch.optim.Adam) -> None:
        """Onto a `trained` of the same layers and its optimizer, which on a CPU take Adam's numbers over uncopied: to
        be done once."""
        for tensor, kept in zip(trained.tensors(), self.tensors, strict=True):
            tensor.copy_(kept)
        adam.load_state_dict(self.adam)


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value
