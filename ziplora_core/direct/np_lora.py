"""NP-LoRA (arXiv 2511.11051): the content update softened inside the style update's row space."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..coefficients import Coefficients
from ..lora_set import CONCEPTS, Factors, LoRASet
from .method import Method

MU = 0.5  # which files written before they said theirs have too


def row_space(factors: Factors) -> Tensor:
    """Right singular vectors of ΔW with a singular value above zero: orthonormal columns (in · kernel, k), float64."""
    triangle = torch.linalg.qr(factors.up.double(), mode="r").R
    small = triangle @ factors.down.double().flatten(1)  # same row space and singular values as ΔW
    _, values, vectors = torch.linalg.svd(small, full_matrices=False)
    kept: Tensor = vectors[values > values.max() * 1e-7]
    return kept.T


def soften(loras: LoRASet, mu: float = MU) -> LoRASet:
    """A_c' = A_c − μ/(1+μ) · A_c V Vᵀ, V = `row_space` of the layer's style update; μ → ∞ projects it away.

    The rank stays. Layers that only one LoRA changes stay as they are. Raises ValueError for other concepts than
    content and style.
    """
    METHOD.check(loras.concepts)
    layers = {}
    for name, layer in loras.layers.items():
        if len(layer) == 2:
            content, style = (layer[concept] for concept in CONCEPTS)
            down = content.down.double().flatten(1)
            vectors = row_space(style)
            down = down - mu / (1 + mu) * (down @ vectors) @ vectors.T
            layer = {**layer, "content": replace(content, down=down.reshape(content.down.shape).to(torch.float32))}
        layers[name] = layer
    return replace(loras, layers=layers)


def prepared(loras: LoRASet, settings: Mapping[str, Any]) -> LoRASet:
    """The softened set. Raises ValueError for a mu that is no finite number from 0 on."""
    mu = settings.get("mu", MU)
    if isinstance(mu, bool) or not isinstance(mu, int | float) or not 0 <= mu < math.inf:
        raise ValueError(f"mu is {mu!r:.40}; expected a finite number, 0 or more")
    return soften(loras, mu)


METHOD = Method(
    "NP-LoRA",
    "what the content LoRA does in the style's own directions is softened",
    lambda loras: (soften(loras), Coefficients.ones(loras)),
    settings={"mu": MU},
    prepared=prepared,
    for_a_pair=True,
    called="NP-LoRA merge",
)
