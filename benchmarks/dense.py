"""The published algorithm, written from the paper: whole ΔW_c and ΔW_s per layer, merged in each forward pass.

Two ways of using the merged update, of the same losses:
    weight: x · (W0 + m_c ⊗ ΔW_c + m_s ⊗ ΔW_s)ᵀ, as the paper writes it (arXiv 2311.13600, Eq. 2)
    update: x · W0ᵀ + x · (m_c ⊗ ΔW_c + m_s ⊗ ΔW_s)ᵀ, as a LoRA layer beside a frozen one, as training scripts have it
Gradients are autograd's. W0 asks for none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

WAYS = ("weight", "update")


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
