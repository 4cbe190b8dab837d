"""Merges that are computed at once from the factors alone, to compare with."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import shares
from .coefficients import Coefficients
from .lora_set import CONCEPTS, Factors, LoRASet


def row_space(factors: Factors) -> Tensor:
    """Right singular vectors of ΔW with a singular value above zero: orthonormal columns (in · kernel, k), float64."""
    triangle = torch.linalg.qr(factors.up.double(), mode="r").R
    small = triangle @ factors.down.double().flatten(1)  # same row space and singular values as ΔW
    _, values, vectors = torch.linalg.svd(small, full_matrices=False)
    kept: Tensor = vectors[values > values.max() * 1e-7]
    return kept.T


MU = 0.5  # NP-LoRA's, which files written before they said theirs have too


def check_a_pair(method: str, concepts: Collection[str]) -> None:
    """Raises ValueError where a method is defined for a content and a style LoRA, and the concepts are others."""
    if method in FOR_A_PAIR and set(concepts) != set(CONCEPTS):
        raise ValueError(
            f"{method} merges one content and one style LoRA; found {len(concepts)}: {', '.join(concepts)}. Choose "
            f"{' or '.join(name for name in METHODS if name not in FOR_A_PAIR)}, which take any"
        )


def np_lora(loras: LoRASet, mu: float = MU) -> LoRASet:
    """NP-LoRA (arXiv 2511.11051): soften the content update inside the style update's row space.

    A_c' = A_c − μ/(1+μ) · A_c V Vᵀ, V = `row_space` of the layer's style update; μ → ∞ projects it away. The rank
    stays. Layers that only one LoRA changes stay as they are. Raises ValueError for other concepts than these two.
    """
    check_a_pair("NP-LoRA", loras.concepts)
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


# Transformer blocks of SDXL's UNet by what they are said to draw; other layers go to nobody or to both.
Blocks = Mapping[str, Sequence[str]]  # "content", "style" -> starts of layer names
B_LORA_BLOCKS: Blocks = {"content": ("output_blocks.0.1.",), "style": ("output_blocks.1.1.",)}  # arXiv 2403.14572
UNZIPLORA_BLOCKS: Blocks = {  # arXiv 2412.04465: up_blocks.0.attentions.0 and .2; up_blocks.0.attentions.1, up_blocks.1
    "content": ("output_blocks.0.1.", "output_blocks.2.1."),
    "style": ("output_blocks.1.1.", "output_blocks.3.", "output_blocks.4.", "output_blocks.5."),
}


def by_blocks(loras: LoRASet, blocks: Blocks, elsewhere: float) -> tuple[LoRASet, Coefficients]:
    """Coefficients of one in a concept's own blocks, zero in the other's, `elsewhere` in the rest.

    Raises ValueError where the set has no layer in a block.
    """

    def inside(name: str, blocks: Sequence[str]) -> bool:
        return any(f".{block}" in name for block in blocks)

    for own in blocks.values():
        if not any(inside(name, own) for name in loras.layers):
            raise ValueError(
                f"no layer of the pair lies in {', '.join(own)}: block presets are for SDXL; "
                "choose another method for this model"
            )

    def weight(concept: str, name: str) -> float:
        owner = next((owner for owner in (concept, *blocks) if inside(name, blocks[owner])), None)
        return elsewhere if owner is None else float(owner == concept)

    ones = Coefficients.ones(loras)
    return loras, Coefficients(
        {c: {name: m * weight(c, name) for name, m in by_layer.items()} for c, by_layer in ones.by_concept.items()}
    )


METHODS: dict[str, Callable[[LoRASet], tuple[LoRASet, Coefficients]]] = {
    "sum": lambda loras: (loras, Coefficients.ones(loras)),
    "shared columns": lambda loras: (loras, shares.merge(loras)),
    "NP-LoRA": lambda loras: (np_lora(loras), Coefficients.ones(loras)),
    "B-LoRA blocks": lambda loras: by_blocks(loras, B_LORA_BLOCKS, elsewhere=0.0),
    "UnZipLoRA blocks": lambda loras: by_blocks(loras, UNZIPLORA_BLOCKS, elsewhere=1.0),
}
FOR_A_PAIR = ("NP-LoRA", "B-LoRA blocks", "UnZipLoRA blocks")  # what they do to one LoRA is not what they do to another


def settings(method: str) -> dict[str, Any]:
    """What a file says of a merge beside its method, so that `prepared` makes the same again."""
    return {"NP-LoRA": {"mu": MU}, "shared columns": {"ridge": shares.RIDGE}}.get(method, {})


def prepared(loras: LoRASet, method: str, settings: Mapping[str, Any]) -> LoRASet:
    """The set that a method's coefficients belong to: only NP-LoRA's is not the files' own.

    settings: as the file says them. Raises ValueError for a mu that is no finite number from 0 on.
    """
    if method != "NP-LoRA":
        return loras
    mu = settings.get("mu", MU)
    if isinstance(mu, bool) or not isinstance(mu, int | float) or not 0 <= mu < math.inf:
        raise ValueError(f"mu is {mu!r:.40}; expected a finite number, 0 or more")
    return np_lora(loras, mu)
