"""K-LoRA (arXiv 2502.18461): in each layer and step of the sampler one of two LoRAs acts whole, the other not at all.

With S_c and S_s the sums of the K largest |ΔW_c| and |ΔW_s| of a layer, K = r_c · r_s, T steps and γ that makes both
LoRAs equally large over all layers, the content LoRA acts in that layer at step t where

    S_c / γ  >  (α t / T + β) S_s,        γ = Σ |ΔW_c| / Σ |ΔW_s|,  α = 1.5,  β = 0.5

so subjects are drawn in the first steps and styles in the last ones. γ leaves no trace of the LoRAs' strengths in the
choice. Of γ the authors' code takes the mean over layers of each layer's ratio, those above three times the mean left
out; here it is the ratio of the sums over all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .lora_set import CONCEPTS, Factors, Layer, LoRASet, is_pair, wide

ALPHA, BETA = 1.5, 0.5  # the paper's
CONTENT, STYLE = CONCEPTS
_SAME = 1e-5  # relative difference of two noise levels that samplers mean to be one


@dataclass(frozen=True)
class Scores:
    """gamma: Σ |ΔW_c| / Σ |ΔW_s|. ratios: layer -> S_c / (γ · S_s), of the layers that both LoRAs change."""

    gamma: float
    ratios: Mapping[str, float]

    def chosen(self, factor: float) -> dict[str, str]:
        """Layer -> the LoRA that acts there where S_s counts `factor` times."""
        return {name: CONTENT if ratio > factor else STYLE for name, ratio in self.ratios.items()}


def scores(loras: LoRASet, device: torch.device | str = "cpu", on_layer: Callable[[], None] = lambda: None) -> Scores:
    """Both LoRAs compared, layer by layer: no more than the two ΔW of one layer are formed, in float32 or wider.

    Raises ValueError where they are not one content and one style LoRA, where they change no layer in common, and
    where one of them changes nothing in those. on_layer: called before each layer.
    """
    if not is_pair(loras.concepts):
        raise ValueError(
            f"K-LoRA chooses between one content and one style LoRA; found {len(loras.concepts)}: "
            f"{', '.join(loras.concepts)}"
        )
    common = {name: layer for name, layer in loras.layers.items() if len(layer) > 1}
    if not common:
        raise ValueError("the two LoRAs change no layer in common, so K-LoRA has nothing to choose; stack them")
    totals = dict.fromkeys(CONCEPTS, 0.0)
    tops: dict[str, dict[str, float]] = {}
    for name, layer in common.items():
        on_layer()
        tops[name] = {}
        for concept, (top, total) in _sums(layer, device).items():
            tops[name][concept] = top
            totals[concept] += total
    for concept, total in totals.items():
        if total == 0:
            raise ValueError(
                f"the {concept} LoRA changes nothing in the layers that both change (its strength may be 0), so K-LoRA "
                "has nothing to choose; use a LoRA loader for the other one"
            )
    gamma = totals[CONTENT] / totals[STYLE]
    return Scores(gamma, {name: _ratio(top[CONTENT], gamma * top[STYLE]) for name, top in tops.items()})


def _sums(layer: Layer, device: torch.device | str) -> dict[str, tuple[float, float]]:
    """Concept -> (sum of its K largest |ΔW|, sum of all)."""
    largest = layer[CONTENT].rank * layer[STYLE].rank
    found = {}
    for concept in CONCEPTS:
        sizes = _update(layer[concept], device).abs_().flatten()
        top = sizes.topk(min(largest, sizes.numel()), sorted=False).values
        found[concept] = float(top.sum()), float(sizes.sum())
    return found


def _update(factors: Factors, device: torch.device | str) -> Tensor:
    """ΔW (out, in · kernel)."""
    up, down = (wide(m.to(device)) for m in (factors.up, factors.down.flatten(1)))
    return (up @ down).mul_(factors.scale)


def _ratio(content: float, style: float) -> float:
    """A layer where neither changes anything is the style's, as a tie is."""
    return content / style if style else float("inf") if content else 0.0


def factor(progress: float, alpha: float = ALPHA, beta: float = BETA) -> float:
    """What the style's sums are multiplied by. progress: t / T, share of the steps that is done."""
    return alpha * progress + beta


def progress(sigma: float, sigmas: Tensor) -> float:
    """t / T of a noise level among a sampler's own, from noise to picture: (T + 1,), the last for its result.

    A step lasts until the next of them, so that samplers which look between two of them stay in the step; a level above
    the first is the first step. Nothing is counted: the same level gives the same answer.
    """
    steps = max(len(sigmas) - 1, 1)
    begun = int((sigmas.float() >= sigma * (1 - _SAME)).sum())
    return min(max(begun - 1, 0), steps - 1) / steps
