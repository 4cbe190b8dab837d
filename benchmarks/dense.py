"""The published algorithm, written from the paper: whole ΔW_c and ΔW_s per layer, merged in each forward pass.

Two ways of using the merged update, of the same losses:
    weight: x · (W0 + m_c ⊗ ΔW_c + m_s ⊗ ΔW_s)ᵀ, as the paper writes it (arXiv 2311.13600, Eq. 2)
    update: x · W0ᵀ + x · (m_c ⊗ ΔW_c + m_s ⊗ ΔW_s)ᵀ, as a LoRA layer beside a frozen one, as training scripts have it
Gradients are autograd's. W0 asks for none.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WAYS = ("weight", "update")
Cast = Callable[[torch.nn.Module, Tensor], AbstractContextManager[tuple[Tensor, Tensor | None]]]


@dataclass
class DenseLayer:
    """base: W0 (out, in). content, style: ΔW of the same shape, at the LoRAs' strengths."""

    base: Tensor
    content: Tensor
    style: Tensor

    @property
    def stored(self) -> int:
        """Bytes kept beside W0."""
        return sum(t.numel() * t.element_size() for t in (self.content, self.style))

    def student(self, x: Tensor, m_c: Tensor, m_s: Tensor, way: str, with_base: bool = True) -> Tensor:
        """With the coefficients (columns,) float32."""
        update = (m_c * self.content + m_s * self.style).to(x.dtype)
        return self._with(x, update, way, with_base)

    def teacher(self, x: Tensor, concept: str, way: str, with_base: bool = True) -> Tensor:
        return self._with(x, self.content if concept == "content" else self.style, way, with_base)

    def _with(self, x: Tensor, update: Tensor, way: str, with_base: bool) -> Tensor:
        if not with_base:
            return F.linear(x, update)
        if way == "weight":
            return F.linear(x, self.base + update)
        return F.linear(x, self.base) + F.linear(x, update)


class DenseBranch:
    """A forward pass of the published algorithm, for a pack's predictor. updates: layer -> (ΔW_c, ΔW_s).

    coefficients: of a student, concept -> layer -> (columns,); a teacher has a concept instead.
    """

    def __init__(self, updates: dict[str, tuple[Tensor, Tensor]], cast: Cast, coefficients=None, concept: str = ""):
        self._updates, self._cast, self._coefficients, self._concept = updates, cast, coefficients, concept

    def layer(self, name: str, x: Tensor, base: Any) -> Tensor:
        content, style = self._updates[name]
        with self._cast(base.module, x) as (weight, bias):
            if self._coefficients is None:
                return F.linear(x, weight + (content if self._concept == "content" else style), bias)
            m_c, m_s = (self._coefficients[c][name].to(x.dtype) for c in ("content", "style"))
            return F.linear(x, weight + m_c * content + m_s * style, bias)


def dense_pair(joined: Any, cast: Cast) -> Any:
    """A JoinedSet of two plain LoRAs as the published algorithm has it; the solver cannot tell them apart."""

    class DensePair(type(joined)):  # type: ignore[misc]
        def __init__(self) -> None:
            self.__dict__.update(joined.__dict__)
            self.updates = {}
            with torch.inference_mode(False), torch.no_grad():
                for name, layer in joined.layers.items():
                    self.updates[name] = tuple(layer.up[:, part] @ layer.down[part] for part in layer.parts.values())

        def student(self, flat: Tensor) -> DenseBranch:
            return DenseBranch(self.updates, cast, coefficients=self.split(flat))

        def teacher(self, concept: Tensor) -> DenseBranch:
            if len({*concept.tolist()}) > 1:
                raise ValueError("the published algorithm runs content and style apart")
            return DenseBranch(self.updates, cast, concept=self.concepts[int(concept[0])])

    return DensePair()
