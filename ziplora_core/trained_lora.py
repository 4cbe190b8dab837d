"""A LoRA's two matrices as they are trained."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .frozen import Base, frozen
from .lora_set import Factors
from .training import Adapted, Plain, Rows


class TrainedLoRA(Plain):
    """The factors of one LoRA, float32: down from a uniform distribution, up zero, alpha = rank, as trainers do.

    shapes: layer -> (out, in). The LoRA's seed decides `down`, so two LoRAs take two.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], rank: int, seed: int, device: torch.device | str = "cpu"):
        generator = torch.Generator().manual_seed(seed % 2**63)
        self.down: dict[str, Tensor] = {}
        self.up: dict[str, Tensor] = {}
        for name, (out, columns) in shapes.items():
            down = (2 * torch.rand(rank, columns, generator=generator) - 1) / math.sqrt(columns)
            self.down[name] = down.to(device).requires_grad_()
            self.up[name] = torch.zeros(out, rank, device=device, requires_grad=True)

    def parameters(self) -> list[Tensor]:
        return [*self.down.values(), *self.up.values()]

    def tensors(self) -> list[Tensor]:
        return self.parameters()

    def branch(self, rows: Rows | None = None) -> Adapted:
        return _Branch(self)

    def largest(self) -> str | None:
        sizes = self.sizes()
        return max(sizes, key=sizes.__getitem__) if any(sizes.values()) else None

    @torch.no_grad()
    def sizes(self) -> dict[str, float]:
        """Layer -> ‖up‖·‖down‖, infinite where one of them is not finite."""
        sizes = {n: float(torch.linalg.norm(up) * torch.linalg.norm(self.down[n])) for n, up in self.up.items()}
        return {name: size if math.isfinite(size) else math.inf for name, size in sizes.items()}

    def added(self, name: str, x: Tensor) -> Tensor:
        """up · down · x in the dtype and on the device of x; differentiable in all three."""
        hidden = F.linear(x, self.down[name].to(x))
        return F.linear(hidden, self.up[name].to(x))

    @torch.no_grad()
    def factors(self) -> dict[str, Factors]:
        """Copies on the CPU."""
        copied = {name: (self.up[name].cpu().clone(), self.down[name].cpu().clone()) for name in self.down}
        return {name: Factors(up.detach(), down.detach()) for name, (up, down) in copied.items()}

    @torch.no_grad()
    def load(self, factors: Mapping[str, Factors]) -> None:
        """Go on from a LoRA. Raises ValueError where it has other layers or another rank."""
        check_fits(factors, self.down, next(iter(self.down.values())).shape[0])
        for name, f in factors.items():
            self.up[name].copy_(f.up.float() * f.scale)
            self.down[name].copy_(f.down.float())


def check_fits(factors: Mapping[str, Factors], layers: Collection[str], rank: int) -> None:
    """Raises ValueError where a LoRA has other layers or another rank than are trained."""
    ranks = {f.rank for f in factors.values()}
    if set(factors) != set(layers) or ranks != {rank}:
        given = "/".join(map(str, sorted(ranks)))
        raise ValueError(
            f"has {len(factors)} layers of rank {given}; expected the {len(layers)} layers that are trained "
            f"here, of rank {rank}: choose the layers and the rank that it was trained with"
        )


class _Branch:
    def __init__(self, trained: TrainedLoRA):
        self._trained = trained

    def layer(self, name: str, x: Tensor, base: Base, **_: Any) -> Tensor:
        return frozen(x, base) + self._trained.added(name, x)
