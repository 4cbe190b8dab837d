"""Merges that are computed at once from the factors alone, to compare with."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .pair import Factors, LayerPair, LoRAPair


def row_space(factors: Factors) -> Tensor:
    """Right singular vectors of ΔW with a singular value above zero: orthonormal columns (in · kernel, k), float64."""
    triangle = torch.linalg.qr(factors.up.double(), mode="r").R
    small = triangle @ factors.down.double().flatten(1)  # same row space and singular values as ΔW
    _, values, vectors = torch.linalg.svd(small, full_matrices=False)
    kept: Tensor = vectors[values > values.max() * 1e-7]
    return kept.T


def np_lora(pair: LoRAPair, mu: float = 0.5) -> LoRAPair:
    """NP-LoRA (arXiv 2511.11051): soften the content update inside the style update's row space.

    A_c' = A_c − μ/(1+μ) · A_c V Vᵀ, V = `row_space` of the layer's style update; μ → ∞ projects it away. The rank
    stays. Layers that only one LoRA changes stay as they are.
    """
    layers = {}
    for name, layer in pair.layers.items():
        if layer.content is not None and layer.style is not None:
            down = layer.content.down.double().flatten(1)
            vectors = row_space(layer.style)
            down = down - mu / (1 + mu) * (down @ vectors) @ vectors.T
            down = down.reshape(layer.content.down.shape).to(torch.float32)
            layer = LayerPair(replace(layer.content, down=down), layer.style)
        layers[name] = layer
    return LoRAPair(layers)
