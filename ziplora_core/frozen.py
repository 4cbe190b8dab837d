"""A frozen layer with a low-rank update on it: forward and backward written out, so that only the input is kept.

Two thin products for all LoRAs forward, three backward, on the joined rank axis R = Σ r_i; ΔW is never formed:

    h = x·Aᵀ        y = W0·x + h·Bᵀ        A = [ A_1·diag(m_1) ; … ; A_n·diag(m_n) ],  B = [ B_1 | … | B_n ]
    g = ∂y·B        ∂x = ∂y·W0 + g·A       ∂A = gᵀ·x,  ∂m_i = Σ over rank of A_i ⊙ ∂A_i
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_CONVOLUTION: dict[int, Callable[..., Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class Base(Protocol):
    """A layer that is not trained and whose weight is not kept.

    forward: from an input. backward: gradient of the input, of this shape, from that of the output. Both give new
    tensors, which may be changed in place.
    """

    def forward(self, x: Tensor) -> Tensor: ...

    def backward(self, grad: Tensor, shape: torch.Size) -> Tensor: ...


@dataclass(frozen=True)
class JoinedLayer:
    """The LoRAs of one layer on one rank axis, one after another.

    up: (out, R) with the scales in it. down: (R, in, *kernel). ranks: concept -> r_i of the LoRAs that change the
    layer; R = Σ r_i.
    """

    up: Tensor
    down: Tensor
    ranks: Mapping[str, int]

    @property
    def columns(self) -> int:
        return self.down.shape[1]

    @cached_property
    def parts(self) -> dict[str, slice]:
        """Concept -> its part of the rank axis."""
        ends = list(accumulate(self.ranks.values(), initial=0))
        return {concept: slice(*ends[i : i + 2]) for i, concept in enumerate(self.ranks)}

    @cached_property
    def _grid(self) -> tuple[Tensor, Tensor | None]:
        """`down` as (groups, ranks, in, *kernel), and which of the layer's coefficient rows belongs to each group.

        A group for each LoRA, in order (None), where all have the same rank; else one for each rank.
        """
        ranks = list(self.ranks.values())
        if len(set(ranks)) == 1:
            return self.down.reshape(len(ranks), ranks[0], *self.down.shape[1:]), None
        owner = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks))
        return self.down.unsqueeze(1), owner.to(self.down.device)

    def scaled_down(self, m: Tensor, dtype: torch.dtype) -> Tensor:
        """`down` with its columns times their coefficients, rounded to `dtype` once.

        m: (LoRAs of the layer * columns,), one after another.
        """
        grid, owner = self._grid
        rows = m.view(-1, self.columns)
        rows = rows if owner is None else rows[owner]
        scaled = torch.empty(grid.shape, dtype=dtype, device=grid.device)
        torch.mul(grid, rows.view(len(rows), 1, self.columns, *[1] * (grid.ndim - 3)), out=scaled)
        return scaled.flatten(0, 1)

    def coefficient_gradient(self, d_down: Tensor, m: Tensor) -> Tensor:
        """Gradient of m from that of `scaled_down`: Σ over rank and kernel of A ⊙ ∂A."""
        grid, owner = self._grid
        products = d_down.view(grid.shape).to(m.dtype).mul_(grid).sum([1, *range(3, grid.ndim)])
        if owner is not None:
            products = products.new_zeros(len(m) // self.columns, self.columns).index_add_(0, owner, products)
        return products.flatten()


@dataclass(frozen=True)
class Update:
    """What the set adds to one layer: up · (down·diag(m)) · x. convolution: stride, padding, dilation of the layer."""

    layer: JoinedLayer
    convolution: Mapping[str, Any]

    def add(self, y: Tensor, x: Tensor, up: Tensor, down: Tensor) -> None:
        """y += up · down · x."""
        if down.ndim == 2:
            _add_product(y, F.linear(x, down.to(x.dtype)), up.to(x.dtype))
        else:
            y.add_(self._convolve(x, up.to(x.dtype), down.to(x.dtype)))

    def _convolve(self, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        convolve = _CONVOLUTION[x.ndim]
        return convolve(convolve(x, down, **self.convolution), up.reshape(*up.shape, *[1] * (x.ndim - 2)))

    def backward(self, grad: Tensor, x: Tensor, m: Tensor, dx: Tensor | None) -> Tensor:
        """Gradient of the coefficients; that of x is added to `dx` where there is one."""
        down, up = self.layer.scaled_down(m, x.dtype), self.layer.up.to(x.dtype)
        if down.ndim == 2:
            hidden = grad.to(x.dtype) @ up
            if dx is not None:
                _add_product(dx, hidden, down.T)
            d_down = hidden.flatten(0, -2).T @ x.flatten(0, -2)
        else:  # few layers of few LoRAs: torch's own way, at the price of computing the update again
            with torch.enable_grad():
                x, down = x.detach().requires_grad_(dx is not None), down.requires_grad_(True)
                wanted = [down] if dx is None else [down, x]
                d_down, *d_input = torch.autograd.grad(self._convolve(x, up, down), wanted, grad.to(x.dtype))
            if dx is not None:
                dx.add_(d_input[0])
        return self.layer.coefficient_gradient(d_down, m)


def project(x: Tensor, down: Tensor, convolution: Mapping[str, Any]) -> Tensor:
    """What a layer's down factors see of its input: (..., R), the rank axis last, in the dtype of x."""
    if down.ndim == 2:
        return F.linear(x, down.to(x.dtype))
    return _CONVOLUTION[x.ndim](x, down.to(x.dtype), **convolution).movedim(1, -1)


def _add_product(y: Tensor, h: Tensor, matrix: Tensor) -> None:
    """y += h · matrixᵀ, in one pass over y where its memory lies so. h: (..., R), matrix: (n, R), y: (..., n)."""
    if y.is_contiguous() and y.dtype == h.dtype:
        y.view(-1, y.shape[-1]).addmm_(h.reshape(-1, h.shape[-1]), matrix.T)
    else:
        y.add_(F.linear(h, matrix))


class _Frozen(torch.autograd.Function):
    """update, m: None for a layer that the set leaves alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Base, update: Update | None, m: Tensor | None) -> Tensor:
        ctx.base, ctx.update, ctx.shape = base, update, x.shape
        y = base.forward(x)
        if update is not None and m is not None:
            ctx.save_for_backward(x, m)
            update.add(y, x, update.layer.up, update.layer.scaled_down(m, x.dtype))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        dx = ctx.base.backward(grad, ctx.shape) if ctx.needs_input_grad[0] else None
        if ctx.update is None:
            return dx, None, None, None
        x, m = ctx.saved_tensors
        return dx, None, None, ctx.update.backward(grad, x, m, dx)


def frozen(x: Tensor, base: Base) -> Tensor:
    """A layer that the set leaves alone; differentiable in x."""
    y: Tensor = _Frozen.apply(x, base, None, None)
    return y


def frozen_with(x: Tensor, base: Base, update: Update, m: Tensor) -> Tensor:
    """A layer with the set on it; differentiable in x and in the coefficients m, as `scaled_down` takes them."""
    y: Tensor = _Frozen.apply(x, base, update, m)
    return y
