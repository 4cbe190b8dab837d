"""DARE (arXiv 2311.03099): numbers of each LoRA dropped at random, the rest enlarged, then added."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..coefficients import Coefficients
from ..lora_set import LoRASet
from . import whole
from .method import Method, number

DROP = 0.5  # the paper chooses one from .1 to .9 for each task; so does peft, which has no default
SEED = 0


def kept(shape: torch.Size, name: str, concept: str, drop: float, seed: int) -> Tensor:
    """Where numbers of a LoRA's update of a layer stay and are not dropped, on the CPU: the same for every device.

    Of each LoRA and layer its own, whatever others are there.
    """
    digest = hashlib.sha256(f"{seed}\n{name}\n{concept}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(shape, generator=generator) >= drop


def merge(loras: LoRASet, drop: float = DROP, seed: int = SEED) -> LoRASet:
    """ΔW = Σ_i (1 − m_i) ⊙ ΔW_i / (1 − p), m_i ~ Bernoulli(p) for each number (section 3.2 of the paper, with task
    arithmetic at weights of one: "linear" in libraries, not followed by TIES).

    Its mean over seeds is the plain sum. ΔW has full rank and is kept whole (`whole`).
    """
    units: whole.Units = {}
    layers = {}
    for name, layer in loras.layers.items():
        updates = {concept: whole.update(factors) for concept, factors in layer.items()}
        parts = [u * kept(u.shape, name, c, drop, seed).to(u.device) / (1 - drop) for c, u in updates.items()]
        layers[name] = whole.keep(layer, parts, units)
    return replace(loras, layers=layers)


def prepared(loras: LoRASet, settings: Mapping[str, Any]) -> LoRASet:
    """Raises ValueError for a drop that is no number from 0 to .99 and a seed that is no number from 0 on."""
    seed = number(settings, "seed", SEED, 0, 2**53)
    return merge(loras, number(settings, "drop", DROP, 0, 0.99), int(seed))


METHOD = Method(
    "DARE",
    "half of each LoRA's numbers, by chance, twice as large",
    lambda loras: (merge(loras), Coefficients.ones(loras)),
    settings={"drop": DROP, "seed": SEED},
    prepared=prepared,
    called="DARE merge",
    told=whole.told,
    needs=whole.size,
)
