"""Published ways to merge two LoRAs, written from their papers' formulas, for the quality table.

Each takes the dense updates of one layer, ΔW_c and ΔW_s (out, in), and gives the merged one. Convolutions and layers
that one LoRA alone changes are added as they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.methods import Case, Merge, Method, node
from benchmarks.rank_mask import rank_mask
from benchmarks.studio import core

Coefficients = core.coefficients.Coefficients
Rule = Callable[..., Tensor]  # of the updates of one layer, one for each LoRA


def dense(rule: Rule) -> Method:
    """A method that merges layer by layer by a rule on the dense updates, float64."""

    def run(case: Case) -> Merge:
        began = time.monotonic()
        layers = dict(case.fitted.loras.layers)
        for name, layer in layers.items():
            if len(layer) < 2 or next(iter(layer.values())).down.ndim > 2:
                continue
            updates = (f.scale * f.up.double() @ f.down.double() for f in layer.values())
            merged = rule(*updates).float()
            layers[name] = {next(iter(layer)): core.lora_set.Factors(merged, torch.eye(merged.shape[1]))}
        merged_set = replace(case.fitted.loras, layers=layers)
        ones = Coefficients.ones(merged_set)
        return Merge(replace(case.fitted, loras=merged_set), ones, time.monotonic() - began)

    return run


def _kept_largest(update: Tensor, share: float) -> Tensor:
    """The update with all but a share of its elements, the largest, set to zero."""
    count = max(1, round(share * update.numel()))
    least = update.abs().flatten().kthvalue(update.numel() - count + 1).values
    return torch.where(update.abs() >= least, update, torch.zeros_like(update))


def _agreeing(updates: Tensor, sign: Tensor) -> Tensor:
    """Mean over the updates (n, ...) of the elements that have the elected sign; zero where none has it."""
    agree = (updates.sign() == sign) & (updates != 0)
    return (updates * agree).sum(0) / agree.sum(0).clamp_min(1)


def ties(share: float = 0.2, scale: float = 1.0) -> Rule:
    """TIES (arXiv 2306.01708): trim to the largest `share`, elect signs by total size, mean of those that agree."""

    def rule(*updates: Tensor) -> Tensor:
        trimmed = torch.stack([_kept_largest(update, share) for update in updates])
        return scale * _agreeing(trimmed, trimmed.sum(0).sign())

    return rule


def dare(drop: float = 0.5, seed: int = 0) -> Rule:
    """DARE (arXiv 2311.03099): drop elements at random, divide the rest by the share that is kept, add."""
    generator = torch.Generator().manual_seed(seed)

    def rule(content: Tensor, style: Tensor) -> Tensor:
        kept = (u * (torch.rand(u.shape, generator=generator) >= drop) / (1 - drop) for u in (content, style))
        return sum(kept, torch.zeros_like(content))

    return rule


def knots(share: float = 0.2, scale: float = 1.0) -> Rule:
    """KnOTS (arXiv 2410.19735): [ΔW_c ΔW_s] = U S [V_c V_s]; TIES on the parts of V, which share one basis."""

    def rule(content: Tensor, style: Tensor) -> Tensor:
        left, values, right = torch.linalg.svd(torch.cat([content, style], dim=1), full_matrices=False)
        kept = values > values.max() * 1e-7
        parts = (values[kept, None] * right[kept]).split(content.shape[1], dim=1)
        return left[:, kept] @ ties(share, scale)(*parts)

    return rule


def tsv(content: Tensor, style: Tensor) -> Tensor:
    """TSV-Merge (arXiv 2412.00081): the upper half of each one's singular vectors, made orthogonal to each other's."""
    lefts, sizes, rights = [], [], []
    for update in (content, style):
        left, values, right = torch.linalg.svd(update, full_matrices=False)
        rank = int((values > values.max() * 1e-7).sum())
        half = max(1, (rank + 1) // 2)
        lefts.append(left[:, :half])
        sizes.append(values[:half])
        rights.append(right[:half].T)

    def whitened(vectors: Tensor) -> Tensor:
        """The orthonormal matrix closest to it."""
        left, _, right = torch.linalg.svd(vectors, full_matrices=False)
        return left @ right

    left, right = whitened(torch.cat(lefts, dim=1)), whitened(torch.cat(rights, dim=1))
    return left @ torch.cat(sizes).diag() @ right.T


def lora_optimizer(content: Tensor, style: Tensor) -> Tensor:
    """ComfyUI-LoRA-Optimizer's documented choice for a layer: TIES where over a quarter of the signs differ, else mean.

    TIES keeps what exceeds a tenth of the largest element (a share from .1 to .9 for a UNet); signs are elected by size
    where one LoRA is over twice as large as the other, else one vote each.
    """
    overlap = (content != 0) & (style != 0)
    if float(((content.sign() != style.sign()) & overlap).sum() / overlap.sum().clamp_min(1)) <= 0.25:
        return (content + style) / 2
    trimmed = []
    for update in (content, style):
        share = float((update.abs() > 0.1 * update.abs().max()).double().mean())
        trimmed.append(_kept_largest(update, min(0.9, max(0.1, share))))
    both = torch.stack(trimmed)
    sizes = sorted(float(update.norm()) for update in (content, style))
    votes = both if sizes[1] > 2 * sizes[0] else both.sign()
    elected = votes.sum(0).sign()
    return _agreeing(both, torch.where(elected == 0, both.sum(0).sign(), elected))


def k_lora(case: Case, steps: int) -> Merge:
    """K-LoRA's coefficients for each of `steps` steps: one LoRA in each layer, the other's coefficients zero."""
    began = time.monotonic()
    ones, scores = case.ones, core.k_lora.scores(case.fitted.loras)
    by_step: list[Coefficients] = []
    before: dict[str, str] = {}
    for step in range(steps):
        chosen = scores.chosen(core.k_lora.factor(step / steps))
        if chosen == before:
            by_step.append(by_step[-1])
            continue
        before = chosen
        sides = {
            concept: {n: m * float(chosen.get(n, concept) == concept) for n, m in side.items()}
            for concept, side in ones.by_concept.items()
        }
        by_step.append(Coefficients(sides))
    return Merge(case.fitted, ones, time.monotonic() - began, by_step)


RIVALS: dict[str, Method] = {
    "TIES": dense(ties()),
    "TIES, half kept": dense(ties(0.5)),
    "DARE": dense(dare()),
    "KnOTS": dense(knots()),
    "TSV-Merge": dense(tsv),
    "LoRA-Optimizer": dense(lora_optimizer),
    "K-LoRA": lambda case: k_lora(case, 20),
    "Mix-of-Show fusion": node(solver="fusion"),
    "rank mask": rank_mask,
}
