"""A frozen layer with a low-rank update on it: forward and backward written out, so that only the input is kept.

Two thin products for both LoRAs forward, three backward, on the joined rank axis R = r_c + r_s; ΔW is never formed:

    h = x·Aᵀ        y = W0·x + h·Bᵀ        A = [ A_c·diag(m_c) ; A_s·diag(m_s) ],  B = [ B_c | B_s ]
    g = ∂y·B        ∂x = ∂y·W0 + g·A       ∂A = gᵀ·x,  ∂m_c = Σ over rank of A_c ⊙ ∂A_c,  ∂m_s likewise
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .pair import column_view

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
    """Both LoRAs of one layer on one rank axis, content first.

    up: (out, R) with the scales in it. down: (R, in, *kernel). R = content_rank + style_rank.
    """

    up: Tensor
    down: Tensor
    content_rank: int

    @property
    def columns(self) -> int:
        return self.down.shape[1]

    @property
    def style_rank(self) -> int:
        return self.down.shape[0] - self.content_rank

    @property
    def parts(self) -> tuple[slice, slice]:
        """The content's and the style's part of the rank axis; either may be empty."""
        return slice(0, self.content_rank), slice(self.content_rank, None)


@dataclass(frozen=True)
class Update:
    """What the pair adds to one layer: up · (down·diag(m)) · x. convolution: stride, padding, dilation of the layer."""

    layer: JoinedLayer
    convolution: Mapping[str, Any]

    def down(self, coefficients: tuple[Tensor | None, ...], dtype: torch.dtype) -> Tensor:
        """A with its columns scaled, (R, in, *kernel); rounded to `dtype` once. None: the layer has no such LoRA."""
        down = self.layer.down
        scaled = torch.empty_like(down, dtype=dtype)
        for part, m in zip(self.layer.parts, coefficients, strict=True):
            if m is not None:
                torch.mul(down[part], column_view(m, down), out=scaled[part])
        return scaled

    def add(self, y: Tensor, x: Tensor, down: Tensor, part: slice = slice(None)) -> None:
        """y += up · down · x. part: of the rank axis, where `down` has only that."""
        if down.ndim == 2:
            _add_product(y, F.linear(x, down), self.layer.up[:, part].to(x.dtype))
        else:
            y.add_(self._convolve(x, down, part))

    def _convolve(self, x: Tensor, down: Tensor, part: slice = slice(None)) -> Tensor:
        convolve, up = _CONVOLUTION[x.ndim], self.layer.up[:, part].to(x.dtype)
        return convolve(convolve(x, down, **self.convolution), up.reshape(*up.shape, *[1] * (x.ndim - 2)))

    def backward(
        self, grad: Tensor, x: Tensor, coefficients: tuple[Tensor | None, ...], dx: Tensor | None
    ) -> list[Tensor | None]:
        """Gradients of the coefficients; that of x is added to `dx` where there is one."""
        down = self.down(coefficients, x.dtype)
        if down.ndim == 2:
            hidden = grad.to(x.dtype) @ self.layer.up.to(x.dtype)
            if dx is not None:
                _add_product(dx, hidden, down.T)
            d_down = hidden.flatten(0, -2).T @ x.flatten(0, -2)
        else:  # few layers of few LoRAs: torch's own way, at the price of computing the update again
            with torch.enable_grad():
                x, down = x.detach().requires_grad_(dx is not None), down.requires_grad_(True)
                wanted = [down] if dx is None else [down, x]
                d_down, *d_input = torch.autograd.grad(self._convolve(x, down), wanted, grad.to(x.dtype))
            if dx is not None:
                dx.add_(d_input[0])
        axes = [0, *range(2, down.ndim)]
        return [
            None if m is None else (d_down[part].to(m.dtype) * self.layer.down[part].to(m.dtype)).sum(axes)
            for part, m in zip(self.layer.parts, coefficients, strict=True)
        ]


def _add_product(y: Tensor, h: Tensor, matrix: Tensor) -> None:
    """y += h · matrixᵀ, in one pass over y where its memory lies so. h: (..., R), matrix: (n, R), y: (..., n)."""
    if y.is_contiguous() and y.dtype == h.dtype:
        y.view(-1, y.shape[-1]).addmm_(h.reshape(-1, h.shape[-1]), matrix.T)
    else:
        y.add_(F.linear(h, matrix))


class _Frozen(torch.autograd.Function):
    """coefficients: (m_c, m_s) of the layer, None for a LoRA that leaves it alone; nothing where there is no update."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Base, update: Update | None, *coefficients: Tensor | None) -> Tensor:
        ctx.base, ctx.update, ctx.shape = base, update, x.shape
        y = base.forward(x)
        if update is not None:
            ctx.save_for_backward(x, *coefficients)
            update.add(y, x, update.down(coefficients, x.dtype))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        dx = ctx.base.backward(grad, ctx.shape) if ctx.needs_input_grad[0] else None
        if ctx.update is None:
            return dx, None, None
        x, *coefficients = ctx.saved_tensors
        return dx, None, None, *ctx.update.backward(grad, x, tuple(coefficients), dx)


def frozen(x: Tensor, base: Base) -> Tensor:
    """A layer that the pair leaves alone; differentiable in x."""
    y: Tensor = _Frozen.apply(x, base, None)
    return y


def frozen_with(x: Tensor, base: Base, update: Update, content: Tensor | None, style: Tensor | None) -> Tensor:
    """A layer with the pair on it; differentiable in x and in the coefficients (columns,)."""
    y: Tensor = _Frozen.apply(x, base, update, content, style)
    return y
