"""Figures of a merge, from the factors alone: no dense ΔW."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from .coefficients import Coefficients
from .pair import Factors, LayerPair, LoRAPair

_ZERO = 1e-6  # a coefficient below this owns no column


def _flat(factors: Factors) -> tuple[Tensor, Tensor, int]:
    """(up, down) in float64 with the kernel folded behind the columns, and the kernel's size."""
    down = factors.down.double()
    kernel = down[0, 0].numel()
    return factors.up.double() * factors.scale, down.reshape(factors.rank, factors.columns * kernel), kernel


def _dot(a: Factors, b: Factors) -> Tensor:
    """Σ over rows (and kernel) of ΔW_a ⊙ ΔW_b for each column: diag(A_aᵀ(B_aᵀB_b)A_b), (columns,) float64."""
    up_a, down_a, kernel = _flat(a)
    up_b, down_b, _ = _flat(b)
    return (down_a * ((up_a.T @ up_b) @ down_b)).sum(0).reshape(-1, kernel).sum(1)


def column_cosines(layer: LayerPair, content: Tensor, style: Tensor) -> Tensor:
    """cos(ΔW_c[:, j]·m_c[j], ΔW_s[:, j]·m_s[j]) for each column j, float64 (columns,).

    Zero where a coefficient is (near) zero, a column is zero, or only one LoRA changes the layer.
    """
    if layer.content is None or layer.style is None:
        return torch.zeros(layer.columns, dtype=torch.float64)
    norms = (_dot(layer.content, layer.content).clamp_min(0) * _dot(layer.style, layer.style).clamp_min(0)).sqrt()
    cosines = torch.where(norms > 0, _dot(layer.content, layer.style) / norms.clamp_min(1e-300), norms * 0)
    signs = torch.sign(content.double() * style.double())
    owned = (content.abs() > _ZERO) & (style.abs() > _ZERO)
    return cosines * torch.where(owned, signs, torch.zeros_like(signs))


def column_alignment(pair: LoRAPair, coefficients: Coefficients) -> dict[str, float]:
    """Mean column alignment of each layer that both LoRAs change (arXiv 2311.13600, Fig. 3b)."""
    return {
        name: column_cosines(layer, coefficients.content[name], coefficients.style[name]).mean().item()
        for name, layer in pair.layers.items()
        if layer.content is not None and layer.style is not None
    }


def column_interference(pair: LoRAPair, coefficients: Coefficients) -> dict[str, float]:
    """Mean of |cos · m_c · m_s| over the columns of each layer that both LoRAs change.

    The paper's Fig. 3b, weighted: scaling a column does not turn it, so that its cosine alone only changes at zero.
    For the direct merge this is the mean |cosine|; 0 where no column is left to both.
    """
    ones = Coefficients.ones(pair)
    found = {}
    for name, layer in pair.layers.items():
        if layer.content is not None and layer.style is not None:
            weights = (coefficients.content[name] * coefficients.style[name]).double()
            cosines = column_cosines(layer, ones.content[name], ones.style[name])
            found[name] = (cosines * weights).abs().mean().item()
    return found


def sampled_elements(pair: LoRAPair, concept: str, rows: int = 16, seed: int = 0) -> Tensor:
    """Elements of one LoRA's ΔW (arXiv 2311.13600, Fig. 3a): some rows of each layer, whole; float32, 1-D.

    concept: "content" or "style". Repeatable for a seed; empty where the LoRA changes nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    found = [torch.empty(0)]
    for layer in pair.layers.values():
        factors = dict(layer.halves()).get(concept)
        if factors is not None:
            chosen = torch.randperm(factors.up.shape[0], generator=generator)[:rows]
            up = factors.up.float()[chosen] * factors.scale
            found.append((up @ factors.down.float().flatten(1)).flatten())
    return torch.cat(found)


def energy_share(elements: Tensor, top: float) -> float:
    """Share of Σ x² that the largest `top` of the elements hold, 0 to 1; 0 for zeros."""
    squares = elements.double().square()
    whole = squares.sum().item()
    count = max(1, round(top * squares.numel())) if squares.numel() else 0
    return squares.topk(count).values.sum().item() / whole if whole else 0.0


_BLOCK = re.compile(r"^(?:diffusion_model\.)?(?P<kind>[a-z_]+?)(?:_?blocks?)?\.(?P<number>\d+)\.")


def block_name(layer: str) -> str:
    """A short name of the network's block that a layer belongs to: "input 4", "middle", "double 0"."""
    found = _BLOCK.match(layer)
    if found is None:
        return ""
    kind = found["kind"].replace("_", " ")
    return kind if kind == "middle" else f"{kind} {found['number']}"
