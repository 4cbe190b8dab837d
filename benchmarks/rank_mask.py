"""DuoLoRA's mask on the rank axis (arXiv 2504.13206, ZipRank) with this pack's objective, for the quality table.

ΔW = Σ_i B_i·diag(m_i)·A_i, with a number for each rank in the place of one for each column, learned as the paper's
coefficients are: Adam, 100 steps at 0.01 from ones, retention alone. Between masks of unequal lengths there is no
overlap; the authors' script counts it zero times. Its layer priors are SDXL's blocks, and its cycle loss takes four
passes more a step: both are left out.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.methods import PAPER_STEPS, Case, Merge, Settings
from benchmarks.studio import core

Coefficients = core.coefficients.Coefficients


class MaskedLayer(core.frozen.JoinedLayer):  # type: ignore[misc]
    """The coefficients of a layer are its ranks': (R,), one LoRA after another."""

    def scaled_down(self, m: Tensor, dtype: torch.dtype) -> Tensor:
        return (self.down * m.view(-1, *[1] * (self.down.ndim - 1))).to(dtype)

    def coefficient_gradient(self, d_down: Tensor, m: Tensor) -> Tensor:
        return (d_down.to(m.dtype) * self.down).flatten(1).sum(1)


class MaskedSet(core.branch.JoinedSet):  # type: ignore[misc]
    """A set whose coefficients are masks of ranks: concept -> layer -> (rank,). No two LoRAs share any."""

    def __init__(self, loras: Any, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        super().__init__(loras, device, dtype)
        self.layers = {name: MaskedLayer(layer.up, layer.down, layer.ranks) for name, layer in self.layers.items()}
        self._layer_sizes = [sum(layer.ranks.values()) for layer in self.layers.values()]
        self._sizes = [self.layers[name].ranks[concept] for name, concept in self._slots]
        self._shared = []

    def ones(self) -> Any:
        layers = self.loras.layers.items()
        return Coefficients(
            {c: {name: torch.ones(layer[c].rank) for name, layer in layers if c in layer} for c in self.concepts}
        )


def masked(loras: Any, masks: Mapping[str, Mapping[str, Tensor]]) -> Any:
    """The LoRAs with their ranks multiplied."""
    layers = {
        name: {
            c: replace(f, down=f.down * masks[c][name].view(-1, *[1] * (f.down.ndim - 1)).to(f.down))
            for c, f in layer.items()
        }
        for name, layer in loras.layers.items()
    }
    return replace(loras, layers=layers)


def rank_mask(case: Case) -> Merge:
    began = time.monotonic()
    joined = MaskedSet(case.joined.loras, case.joined.device, case.joined.dtype)
    settings = Settings(seed=case.seed, **PAPER_STEPS)
    masks = core.gradient.optimize(joined, case.predictor, case.references, settings).coefficients
    loras = masked(case.fitted.loras, masks.by_concept)
    return Merge(replace(case.fitted, loras=loras), Coefficients.ones(loras), time.monotonic() - began)
