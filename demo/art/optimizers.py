"""Muon for the matrices of hidden layers, AdamW for all else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Optimizers:
    """Muon for hidden layers' matrices; AdamW for biases, norms, embeddings, and layers at the ends.

    On the base 200 steps of Muon reach the loss of 1,900 of AdamW. Muon takes matrices alone, so a convolution is one
    of out x (height, width, in), as it lies in memory (channels last). ends: first and last layers, embeddings.
    """

    def __init__(
        self, trained: Iterable[Tensor], ends: Iterable[nn.Module], muon_rate: float, adam_rate: float, decay: float
    ) -> None:
        apart = {id(p) for module in ends for p in module.parameters()}
        hidden: list[Tensor] = []
        rest: list[Tensor] = []
        for p in trained:
            (hidden if p.ndim > 1 and id(p) not in apart else rest).append(p)
        self.hidden = [(p, nn.Parameter(_matrix(p.detach()))) for p in hidden]
        matrices = [matrix for _, matrix in self.hidden]
        muon = torch.optim.Muon(matrices, muon_rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        adam = torch.optim.AdamW(rest, adam_rate, betas=(0.9, 0.99), weight_decay=decay, fused=True)
        self.each = [(muon, muon_rate), (adam, adam_rate)]

    def step(self, part: float) -> None:
        """part: of the learning rates."""
        for p, matrix in self.hidden:
            matrix.grad = None if p.grad is None else _matrix(p.grad)
        for optimizer, rate in self.each:
            for group in optimizer.param_groups:
                group["lr"] = rate * part
            optimizer.step()

    def state(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer, _ in self.each]

    def load(self, states: list[dict[str, Any]]) -> None:
        for (optimizer, _), state in zip(self.each, states, strict=True):
            optimizer.load_state_dict(state)


def _matrix(weight: Tensor) -> Tensor:
    """out x in, in the weight's own memory where a convolution's channels lie last."""
    return (weight.permute(0, 2, 3, 1) if weight.ndim == 4 else weight).flatten(1)
