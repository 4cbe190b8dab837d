"""A running mean of weights that are trained, to be written in their place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class Averages:
    """values: the means, of the weights' shapes. most: the largest share that a step keeps of them."""

    def __init__(self, trained: Sequence[Tensor], most: float) -> None:
        self.trained, self.most = list(trained), most
        self.values = [p.detach().clone() for p in self.trained]

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Take in the weights after a step (from 0); the first ones count more, so that the start is soon forgotten."""
        torch._foreach_lerp_(self.values, self.trained, 1 - min(self.most, (step + 1) / (step + 10)))

    def state(self) -> dict[str, list[Tensor]]:
        return {"weights": [p.detach() for p in self.trained], "averages": self.values}

    @torch.no_grad()
    def load(self, state: dict[str, list[Tensor]]) -> None:
        """Weights and means of an earlier `state`."""
        for p, value, average, smooth in zip(
            self.trained, state["weights"], self.values, state["averages"], strict=True
        ):
            p.copy_(value)
            average.copy_(smooth)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The means in the place of the weights, for as long as it lasts."""
        kept = [p.detach().clone() for p in self.trained]
        self._put(self.values)
        try:
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor]) -> None:
        for p, value in zip(self.trained, values, strict=True):
            p.copy_(value)
