"""Merges that are computed at once from the factors alone, to compare with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import shares
from .coefficients import Coefficients
from .pair import Factors, LayerPair, LoRAPair


def row_space(factors: Factors) -> Tensor:
    """Right singular vectors of ΔW with a singular value above zero: orthonormal columns (in · kernel, k), float64."""
    triangle = torch.linalg.qr(factors.up.double(), mode="r").R
    small = triangle @ factors.down.double().flatten(1)  # same row space and singular values as ΔW
    _, values, vectors = torch.linalg.svd(small, full_matrices=False)
    kept: Tensor = vectors[values > values.max() * 1e-7]
    return kept.T


MU = 0.5  # NP-LoRA's, which files written before they said theirs have too


def np_lora(pair: LoRAPair, mu: float = MU) -> LoRAPair:
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


# Transformer blocks of SDXL's UNet by what they are said to draw; other layers go to nobody or to both.
Blocks = Mapping[str, Sequence[str]]  # "content", "style" -> starts of layer names
B_LORA_BLOCKS: Blocks = {"content": ("output_blocks.0.1.",), "style": ("output_blocks.1.1.",)}  # arXiv 2403.14572
UNZIPLORA_BLOCKS: Blocks = {  # arXiv 2412.04465: up_blocks.0.attentions.0 and .2; up_blocks.0.attentions.1, up_blocks.1
    "content": ("output_blocks.0.1.", "output_blocks.2.1."),
    "style": ("output_blocks.1.1.", "output_blocks.3.", "output_blocks.4.", "output_blocks.5."),
}


def by_blocks(
    pair: LoRAPair, content: Sequence[str], style: Sequence[str], elsewhere: float
) -> tuple[LoRAPair, Coefficients]:
    """Coefficients of one in a concept's own blocks, zero in the other's, `elsewhere` in the rest.

    content, style: parts of layer names. Raises ValueError where the pair has no layer in a block.
    """

    def inside(name: str, blocks: Sequence[str]) -> bool:
        return any(f".{block}" in name for block in blocks)

    for blocks in (content, style):
        if not any(inside(name, blocks) for name in pair.layers):
            raise ValueError(
                f"no layer of the pair lies in {', '.join(blocks)}: block presets are for SDXL; "
                "choose another method for this model"
            )
    ones = Coefficients.ones(pair)
    sides = []
    for side, own, other in ((ones.content, content, style), (ones.style, style, content)):
        weights = {n: 1.0 if inside(n, own) else 0.0 if inside(n, other) else elsewhere for n in side}
        sides.append({n: m * weights[n] for n, m in side.items()})
    return pair, Coefficients(*sides)


METHODS: dict[str, Callable[[LoRAPair], tuple[LoRAPair, Coefficients]]] = {
    "sum": lambda pair: (pair, Coefficients.ones(pair)),
    "shared columns": lambda pair: (pair, shares.merge(pair)),
    "NP-LoRA": lambda pair: (np_lora(pair), Coefficients.ones(pair)),
    "B-LoRA blocks": lambda pair: by_blocks(pair, **B_LORA_BLOCKS, elsewhere=0.0),
    "UnZipLoRA blocks": lambda pair: by_blocks(pair, **UNZIPLORA_BLOCKS, elsewhere=1.0),
}


def settings(method: str) -> dict[str, Any]:
    """What a file says of a merge beside its method, so that `prepared` makes the same again."""
    return {"NP-LoRA": {"mu": MU}, "shared columns": {"ridge": shares.RIDGE}}.get(method, {})


def prepared(pair: LoRAPair, method: str, settings: Mapping[str, Any]) -> LoRAPair:
    """The pair that a method's coefficients belong to: only NP-LoRA's is not the files' own.

    settings: as the file says them. Raises ValueError for a mu that is no finite number from 0 on.
    """
    if method != "NP-LoRA":
        return pair
    mu = settings.get("mu", MU)
    if isinstance(mu, bool) or not isinstance(mu, int | float) or not 0 <= mu < math.inf:
        raise ValueError(f"mu is {mu!r:.40}; expected a finite number, 0 or more")
    return np_lora(pair, mu)
