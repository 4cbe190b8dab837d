"""A merge in which each layer's columns are shared out: strong columns share their place, weak ones stay.

With a_k the column of LoRA k's update that belongs to one input feature of a layer, and m_k its coefficient, the merged
column should add what each LoRA alone adds, under each reference r by as much as the feature is active there:

    min over m of  Σ_r v_r ‖Σ_k m_k a_k − a_r‖²  +  ridge · q · ‖m − 1‖²,        v_r = w_r E_r[x²]

x is the feature's value, w_r one over what the other LoRAs add in that layer under reference r,
Σ over features of E_r[x²] ‖Σ_{k≠r} a_k‖², and q the mean of (Σ_r v_r) ‖a_k‖² over the layer's columns. With the Gram
matrix G of the columns the minimum is (s G + ridge · q)⁻¹ (G v + ridge · q · 1), s = Σ_r v_r: v / s where columns are
strong, 1 where they are weak. Without E_r[x²] every feature is as active as any other: a merge by the weights alone,
for which no picture, prompt or model pass is needed. `layerwise` measures E_r[x²].

Features of one layer count as uncorrelated. With whole second moments E_r[x xᵀ], which couple all columns of a layer,
pictures are no better (docs/benchmarks.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .coefficients import Coefficients
from .lora_set import Factors, LoRASet

RIDGE = 0.3


def column_grams(factors: Sequence[Factors]) -> Tensor:
    """Inner products of the columns that n LoRAs have in one layer: (columns, n, n) float64, from the factors.

    A convolution's column is all that belongs to one input channel.
    """
    downs = [f.down.float().flatten(2) if f.down.ndim > 2 else f.down.float()[..., None] for f in factors]
    ups = [f.scale * f.up.float() for f in factors]
    grams = torch.empty(factors[0].columns, len(factors), len(factors), dtype=torch.float64, device=ups[0].device)
    for i, (up, down) in enumerate(zip(ups, downs, strict=True)):
        for j in range(i + 1):
            seen = ((ups[j].T @ up) @ down.flatten(1)).view(-1, *down.shape[1:])
            grams[:, i, j] = grams[:, j, i] = seen.mul_(downs[j]).sum((0, 2))
    return grams


def shares(grams: Tensor, active: Tensor | None = None) -> Tensor:
    """v of a layer's columns, (columns, n): each LoRA's weight there. Their sum over LoRAs is 1 in the mean.

    grams: (columns, n, n). active: E_r[x²] (columns, n), None for ones. A LoRA weighs as much as the others' update is
    small beside its own. Where the others add nothing a LoRA has all of it; where nobody adds anything, equal parts.
    """
    columns, count = grams.shape[:2]
    if active is None:
        active = grams.new_ones(columns, count)
    others = 1 - torch.eye(count, dtype=grams.dtype, device=grams.device)
    disturbance = torch.einsum("jr,ri,jil,rl->r", active, others, grams, others).clamp_min(0)
    own = torch.einsum("jr,jii->r", active, grams)
    silent = disturbance <= torch.finfo(grams.dtype).eps * own
    weights = silent.to(grams.dtype) if silent.any() else 1 / disturbance
    v = weights * active
    return v / v.sum(1).mean().clamp_min(torch.finfo(grams.dtype).tiny)


@dataclass(frozen=True)
class SharedLayer:
    """One layer's coefficients, (columns,) float32 for each of the n LoRAs in turn.

    left: of the direct merge's error, Σ_r v_r ‖Σ_k m_k a_k − a_r‖² over all columns; 1 where that has none.
    """

    coefficients: list[Tensor]
    left: float


def share(factors: Sequence[Factors], ridge: float = RIDGE, active: Tensor | None = None) -> SharedLayer:
    """The minimum above for one layer: ones for a single LoRA, or where no feature is active.

    active: E_r[x²] (columns, n) on the factors' device, None for ones.
    """
    grams = column_grams(factors)
    v = shares(grams, None if active is None else active.double())
    total = v.sum(1)[:, None, None]
    q = (total * grams).diagonal(dim1=1, dim2=2).mean().clamp_min(torch.finfo(torch.float64).tiny)
    identity = torch.eye(len(factors), dtype=grams.dtype, device=grams.device)
    wanted = (grams @ v[..., None]) + ridge * q
    solution = torch.linalg.solve(total * grams + ridge * q * identity, wanted)

    def error(m: Tensor) -> float:
        merged = total * (m.mT @ grams @ m) - 2 * m.mT @ grams @ v[..., None]
        return float(merged.sum() + (v * grams.diagonal(dim1=1, dim2=2)).sum())

    direct = error(torch.ones_like(solution))
    left = max(error(solution), 0.0) / direct if direct > 0 else 1.0
    return SharedLayer([m.to("cpu", torch.float32) for m in solution[..., 0].unbind(1)], left)


def merge(loras: LoRASet, ridge: float = RIDGE) -> Coefficients:
    """The coefficients of every layer by the weights alone. ridge: the larger, the nearer to the direct merge.

    Raises FloatingPointError where a layer's numbers are not finite.
    """
    found: dict[str, dict[str, Tensor]] = {concept: {} for concept in loras.concepts}
    with torch.inference_mode(False), torch.no_grad():
        for name, layer in loras.layers.items():
            solved = share(list(layer.values()), ridge)
            refuse_not_finite(name, solved)
            for concept, m in zip(layer, solved.coefficients, strict=True):
                found[concept][name] = m
    return Coefficients(found)


def refuse_not_finite(name: str, solved: SharedLayer) -> None:
    """Raises FloatingPointError where a layer's coefficients are no numbers."""
    if not all(m.isfinite().all() for m in solved.coefficients):
        raise FloatingPointError(
            f"layer {name}: what the LoRAs do there is not finite; look at the LoRA's numbers, or load the model in "
            "bf16 or fp32"
        )
