"""The low-rank branch of a forward pass: what the two LoRAs add to each layer's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .coefficients import Coefficients
from .frozen import Base, JoinedLayer, Update, frozen_with
from .merge import merged_factors
from .pair import LayerPair, LoRAPair


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
        self._layer_sizes = [layer.columns * len(list(layer.halves())) for layer in pair.layers.values()]
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
        """Views of `flat`: concept -> layer -> (columns,)."""
        parts: dict[str, dict[str, Tensor]] = {"content": {}, "style": {}}
        for (name, concept), part in zip(self._slots, torch.split(flat, self._sizes), strict=True):
            parts[concept][name] = part
        return parts

    def shared_columns(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """(m_c, m_s) of the columns that both LoRAs change, `shared_sizes` of them a layer: what overlap is made of."""
        return flat[self._shared["content"]], flat[self._shared["style"]]

    def student(self, flat: Tensor) -> Branch:
        """Every row sees ΔW_m = ΔW_c·diag(m_c) + ΔW_s·diag(m_s); differentiable in `flat`."""
        parts = torch.split(flat, self._layer_sizes)
        return Branch(self.layers, coefficients=dict(zip(self.layers, parts, strict=True)))

    def teacher(self, is_style: Tensor) -> Branch:
        """Row i sees its own LoRA alone: style where is_style[i], else content. is_style: (rows,) bool."""
        return Branch(self.layers, is_style=is_style)


class Branch:
    """What the two LoRAs do in one forward pass, as student (with coefficients) or as teacher (with is_style).

    A predictor hands `layer` the input of each layer that the pair changes.
    """

    def __init__(
        self,
        layers: Mapping[str, JoinedLayer],
        coefficients: Mapping[str, Tensor] | None = None,
        is_style: Tensor | None = None,
    ):
        if (coefficients is None) == (is_style is None):
            raise ValueError(
                "a branch is a student, with coefficients, or a teacher, with is_style; found both or none"
            )
        self._layers = layers
        self._coefficients = coefficients
        self._content_rows, self._rows = (0, 1) if is_style is None else (int((~is_style).sum()), len(is_style))

    def layer(self, name: str, x: Tensor, base: Base, **convolution: Any) -> Tensor:
        """Output of layer `name` with the pair on it.

        x: (rows, ..., in) for a linear layer; (rows, in, *space) for a convolution, whose stride, padding
        and dilation come as keywords. Computed in the dtype of x. A student is differentiable in x and in the
        coefficients and keeps nothing for backward but x; a teacher has no gradient.
        """
        update = Update(self._layers[name], convolution)
        if self._coefficients is not None:
            return frozen_with(x, base, update, self._coefficients[name])
        with torch.no_grad():
            y = base.forward(x)
            for x_own, y_own, (up, down) in zip(self.own(x), self.own(y), update.layer.halves, strict=True):
                if len(x_own) and len(down):
                    update.add(y_own, x_own, up, down)
            return y

    def own(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A teacher's content rows and style rows of a layer's input, also where a model folds frames into rows."""
        first = len(x) * self._content_rows // self._rows
        content, style = torch.split(x, [first, len(x) - first])
        return content, style
