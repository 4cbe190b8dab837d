"""The low-rank branch of a forward pass: what the two LoRAs add to each layer's output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .coefficients import Coefficients
from .merge import merged_factors
from .pair import LayerPair, LoRAPair, column_view

_CONVOLUTION: dict[int, Callable[..., Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


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


def _join(layer: LayerPair, device: torch.device | str, dtype: torch.dtype) -> JoinedLayer:
    up, down = merged_factors(layer, None, None)
    rank = layer.content.rank if layer.content is not None else 0
    return JoinedLayer(up.to(device, dtype), down.to(device, dtype), rank)


def _positions(starts: Sequence[int], sizes: Sequence[int], device: torch.device) -> Tensor:
    """Indices of several runs of a vector, one after another."""
    runs = [torch.arange(start, start + size, device=device) for start, size in zip(starts, sizes, strict=True)]
    return torch.cat(runs) if runs else torch.zeros(0, dtype=torch.int64, device=device)


class JoinedPair:
    """A pair made ready for many forward passes: joined factors in the compute dtype, on the compute device.

    The coefficients of all layers form one flat float32 vector, so that one optimiser update serves them all:
    layer by layer in the pair's order, content before style.
    """

    def __init__(self, pair: LoRAPair, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        self.pair = pair
        self.device = torch.device(device)
        self.dtype = dtype
        self.layers = {name: _join(layer, device, dtype) for name, layer in pair.layers.items()}
        self._slots = [(name, concept) for name, layer in pair.layers.items() for concept, _ in layer.halves()]
        self._sizes = [self.layers[name].columns for name, _ in self._slots]
        starts = dict(zip(self._slots, accumulate(self._sizes, initial=0), strict=False))
        both = [name for name, layer in pair.layers.items() if layer.content is not None and layer.style is not None]
        self.shared_sizes = [self.layers[name].columns for name in both]
        self._shared = {
            concept: _positions([starts[name, concept] for name in both], self.shared_sizes, self.device)
            for concept in ("content", "style")
        }

    def flatten(self, coefficients: Coefficients) -> Tensor:
        """All coefficients as one vector (pair.coefficient_count,) on this pair's device, float32 or wider."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        sides = {"content": coefficients.content, "style": coefficients.style}
        return torch.cat([sides[concept][name].to(self.device, dtype) for name, concept in self._slots])

    def unflatten(self, flat: Tensor) -> Coefficients:
        """The inverse of `flatten`: float32 copies on the CPU."""
        content: dict[str, Tensor] = {}
        style: dict[str, Tensor] = {}
        for (name, concept), part in zip(self._slots, torch.split(flat.detach(), self._sizes), strict=True):
            (content if concept == "content" else style)[name] = part.to("cpu", torch.float32, copy=True)
        return Coefficients(content, style)

    def split(self, flat: Tensor) -> dict[str, dict[str, Tensor]]:
        """Views of `flat`: concept -> layer -> (columns,). One node of the autograd graph for all layers."""
        parts: dict[str, dict[str, Tensor]] = {"content": {}, "style": {}}
        for (name, concept), part in zip(self._slots, torch.split(flat, self._sizes), strict=True):
            parts[concept][name] = part
        return parts

    def shared_columns(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """(m_c, m_s) of the columns that both LoRAs change, `shared_sizes` of them a layer: what overlap is made of."""
        return flat[self._shared["content"]], flat[self._shared["style"]]

    def student(self, flat: Tensor) -> Branch:
        """Every row sees ΔW_m = ΔW_c·diag(m_c) + ΔW_s·diag(m_s); differentiable in `flat`."""
        return Branch(self.layers, coefficients=self.split(flat))

    def teacher(self, is_style: Tensor) -> Branch:
        """Row i sees its own LoRA alone: style where is_style[i], else content. is_style: (rows,) bool."""
        return Branch(self.layers, is_style=is_style)


def style_rows(is_style: Tensor, x: Tensor) -> Tensor:
    """is_style (rows,) for each row of a layer's input or output, on its device: (x.shape[0],) bool."""
    rows = is_style.to(x.device)
    if x.shape[0] != rows.shape[0]:  # a model that folds frames or windows into the batch, row-major
        rows = rows.repeat_interleave(x.shape[0] // rows.shape[0])
    return rows


class Branch:
    """Adds up·(down·x) to the layers of one forward pass, as student or as teacher.

    A predictor calls `delta` with the input of each layer that the pair changes and adds the result to
    that layer's own output.
    """

    def __init__(
        self,
        layers: Mapping[str, JoinedLayer],
        coefficients: Mapping[str, Mapping[str, Tensor]] | None = None,
        is_style: Tensor | None = None,
    ):
        self._layers = layers
        self._coefficients = coefficients
        self._is_style = is_style

    def _down(self, name: str, dtype: torch.dtype) -> Tensor:
        layer = self._layers[name]
        if self._coefficients is None:
            return layer.down.to(dtype)
        parts: Sequence[Tensor] = [
            half * column_view(self._coefficients[concept][name], half)
            for concept, half in (
                ("content", layer.down[: layer.content_rank]),
                ("style", layer.down[layer.content_rank :]),
            )
            if half.shape[0]
        ]
        return (torch.cat(list(parts)) if len(parts) > 1 else parts[0]).to(dtype)

    def _own_half(self, hidden: Tensor, layer: JoinedLayer, axis: int) -> Tensor:
        """Zero the half of the rank axis that does not belong to a row's concept."""
        if self._is_style is None:
            return hidden
        rows = style_rows(self._is_style, hidden)
        rank = torch.arange(layer.down.shape[0], device=hidden.device)
        mask = (rank >= layer.content_rank) == rows[:, None]
        shape = [1] * hidden.ndim
        shape[0], shape[axis] = mask.shape[0], mask.shape[1]
        return hidden * mask.to(hidden.dtype).reshape(shape)

    def delta(self, name: str, x: Tensor, **convolution: Any) -> Tensor:
        """What the pair adds to the output of layer `name` for input x.

        x: (rows, ..., in) for a linear layer; (rows, in, *space) for a convolution, whose stride, padding
        and dilation come as keywords. Computed in the dtype of x; keeps nothing for backward but x.
        """
        layer = self._layers[name]
        down = self._down(name, x.dtype)
        up = layer.up.to(x.dtype)
        if down.ndim == 2:
            return F.linear(self._own_half(F.linear(x, down), layer, -1), up)
        conv = _CONVOLUTION[x.ndim]
        hidden = self._own_half(conv(x, down, **convolution), layer, 1)
        return conv(hidden, up.reshape(*up.shape, *([1] * (x.ndim - 2))))
