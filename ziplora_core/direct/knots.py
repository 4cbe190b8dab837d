"""KnOTS (arXiv 2410.19735): TIES in the space that all LoRAs of a layer span together, of low rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..coefficients import Coefficients
from ..lora_set import Factors, Layer, LoRASet
from .election import SCALE, SHARE, elected, least_kept
from .method import Method, number


def aligned(layer: Layer) -> tuple[Tensor, list[Tensor]]:
    """U (out, k) and Σ V_iᵀ (k, in · kernel) of [ΔW_1 | … | ΔW_n] = U Σ [V_1ᵀ | … | V_nᵀ], float32.

    From the factors, no ΔW formed: with [s_1 B_1 | … | s_n B_n] = Q R and A_iᵀ = Q_i R_i, the SVD of the small matrix
    [R^1 R_1ᵀ | … | R^n R_nᵀ], R^i the columns of R that are LoRA i's, in float64. k: singular values above zero.
    """
    left, triangle = torch.linalg.qr(torch.cat([f.scale * f.up.double() for f in layer.values()], dim=1))
    rights = [torch.linalg.qr(f.down.double().flatten(1).T) for f in layer.values()]
    ranks = [f.rank for f in layer.values()]
    small = [mine @ right.R.T for mine, right in zip(triangle.split(ranks, dim=1), rights, strict=True)]
    u, values, vh = torch.linalg.svd(torch.cat(small, dim=1), full_matrices=False)
    count = max(1, int((values > values.max() * 1e-7).sum()))
    parts = (values[:count, None] * vh[:count]).split([s.shape[1] for s in small], dim=1)
    return (left @ u[:, :count]).float(), [(p @ r.Q.T).float() for p, r in zip(parts, rights, strict=True)]


def merge(loras: LoRASet, share: float = SHARE, scale: float = SCALE) -> LoRASet:
    """ΔW = U · TIES(Σ V_1ᵀ, …, Σ V_nᵀ) in each layer: exactly of the rank k of `aligned`, no more than Σ r_i.

    Σ stands with the V_i, as in the authors' code (the paper's text leaves it with U), and the `share` that is trimmed
    is of all layers of a LoRA together, as in `ties`. Each LoRA keeps its own part of the sum, on the same U. Where two
    singular values are equal, their vectors, and with them the merge, are not unique.
    """
    spaces = {name: aligned(layer) for name, layer in loras.layers.items()}
    mine: dict[str, list[Tensor]] = {}
    for name, layer in loras.layers.items():
        for concept, part in zip(layer, spaces[name][1], strict=True):
            mine.setdefault(concept, []).append(part)
    least = {concept: least_kept(partial(iter, parts), share) for concept, parts in mine.items()}
    layers = {}
    for name, layer in loras.layers.items():
        up, parts = spaces.pop(name)
        merged = elected(parts, [least[concept] for concept in layer], scale)
        layers[name] = {
            concept: Factors(up, part.reshape(-1, *factors.down.shape[1:]))
            for (concept, factors), part in zip(layer.items(), merged, strict=True)
        }
    return replace(loras, layers=layers)


def prepared(loras: LoRASet, settings: Mapping[str, Any]) -> LoRASet:
    """Raises ValueError as `ties.prepared` does."""
    return merge(loras, number(settings, "share", SHARE, 0, 1), number(settings, "scale", SCALE, 0, 100))


METHOD = Method(
    "KnOTS",
    "as TIES, but in directions that all LoRAs share, so that it stays a small LoRA",
    lambda loras: (merge(loras), Coefficients.ones(loras)),
    settings={"share": SHARE, "scale": SCALE},
    prepared=prepared,
    called="KnOTS merge",
)
