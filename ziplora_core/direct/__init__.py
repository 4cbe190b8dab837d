"""Training-free merges, computed from the factors alone: one module each, in the order of the node's menu."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..lora_set import LoRASet
from . import blocks, dare, knots, np_lora, plain_sum, shared_columns, svd, ties, tsv
from .method import Method

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        plain_sum.METHOD,
        shared_columns.METHOD,
        np_lora.METHOD,
        ties.METHOD,
        dare.METHOD,
        knots.METHOD,
        tsv.METHOD,
        svd.METHOD,
        blocks.B_LORA,
        blocks.UNZIPLORA,
    )
}


def prepared(loras: LoRASet, method: str, settings: Mapping[str, Any]) -> LoRASet:
    """The set that coefficients of a file belong to, of any method, also one that is not in `METHODS`.

    settings: as the file says them. Raises ValueError for settings that the method cannot take.
    """
    known = method in METHODS and len(loras.concepts) > 1
    return METHODS[method].prepared(loras, settings) if known else loras
