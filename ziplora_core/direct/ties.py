"""TIES (arXiv 2306.01708): each LoRA trimmed to its largest numbers, signs elected, the mean of those that agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from ..coefficients import Coefficients
from ..lora_set import LoRASet
from . import whole
from .election import SCALE, SHARE, elected, least_kept
from .method import Method, number


def _updates(loras: LoRASet, concept: str) -> Iterator[Tensor]:
    return (whole.update(layer[concept]) for layer in loras.layers.values() if concept in layer)


def merge(loras: LoRASet, share: float = SHARE, scale: float = SCALE) -> LoRASet:
    """ΔW = λ · mean over A of trim(ΔW_i), element by element (`election`).

    As in the paper, the `share` that is kept is one of the whole task vector, all layers that a LoRA changes together,
    so that a layer that it hardly changes may be trimmed away; libraries trim each layer apart. ΔW has full rank and is
    kept whole (`whole`). It is made three times, a layer at a time, rather than held.
    """
    there = {concept for layer in loras.layers.values() for concept in layer}
    least = {concept: least_kept(partial(_updates, loras, concept), share) for concept in there}
    units: whole.Units = {}
    layers = {
        name: whole.keep(layer, elected([*map(whole.update, layer.values())], [least[c] for c in layer], scale), units)
        for name, layer in loras.layers.items()
    }
    return replace(loras, layers=layers)


def prepared(loras: LoRASet, settings: Mapping[str, Any]) -> LoRASet:
    """Raises ValueError for a share that is none, and for a scale that is no number from 0 to 100."""
    return merge(loras, number(settings, "share", SHARE, 0, 1), number(settings, "scale", SCALE, 0, 100))


METHOD = Method(
    "TIES",
    "the largest fifth of each LoRA's numbers, and of these the mean of those that agree in sign",
    lambda loras: (merge(loras), Coefficients.ones(loras)),
    settings={"share": SHARE, "scale": SCALE},
    prepared=prepared,
    called="TIES merge",
    told=whole.told,
    needs=whole.size,
)
