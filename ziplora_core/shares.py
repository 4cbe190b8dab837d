"""A merge in which each layer's columns are shared out: strong columns share their place, weak ones stay.

With a_k the column of LoRA k's update that belongs to one input feature of a layer, and m_k its coefficient, the merged
column should add what each LoRA alone adds, under each reference r by as much as the feature is active there:

    min over m of  Σ_r v_r ‖Σ_k m_k a_k − a_r‖²  +  ridge · q · ‖m − 1‖²,        v_r = w_r E_r[x²]

x is the feature's value, w_r what LoRA r adds in that layer under the references of the others, Σ over features of
E_k[x²] ‖a_r‖², the mean over k ≠ r by the size of k's update, and q the mean of (Σ_r v_r) ‖a_k‖² over the columns of
the LoRAs that add anything there. So one that adds next to nothing leaves the others as they are without it. With the
Gram matrix G of the columns the minimum is (s G + ridge · q)⁻¹ (G v + ridge · q · 1), s = Σ_r v_r: v / s where columns
are strong, 1 where they are weak. Without E_r[x²] every feature is as active as any other: a merge by the weights
alone, for which no picture, prompt or model pass is needed. `layerwise` measures E_r[x²].

Features of one layer count as uncorrelated. With whole second moments E_r[x xᵀ], which couple all columns of a layer,
pictures are no better (docs/benchmarks.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .coefficients import Coefficients
from .lora_set import Factors, Layer, LoRASet, column_grams

RIDGE = 0.3


def device_of_float64(device: torch.device) -> torch.device:
    """Where layers are solved: Apple's GPUs have no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def shares(grams: Tensor, active: Tensor | None = None) -> Tensor:
    """v of a layer's columns, (columns, n): each LoRA's weight there. Their sum over LoRAs is 1 in the mean.

    grams: (columns, n, n). active: E_r[x²] (columns, n), None for ones. A LoRA weighs as much as it would disturb the
    others: one that adds nothing takes nothing from them. Where no other adds anything, it has all.
    """
    columns, count = grams.shape[:2]
    if active is None:
        active = grams.new_ones(columns, count)
    sizes = grams.diagonal(dim1=1, dim2=2)
    others = sizes.sum(0)[:, None] * (1 - torch.eye(count, dtype=grams.dtype, device=grams.device))
    weights = torch.einsum("jk,kr,jr->r", active, others, sizes) / others.sum(0)
    v = active * torch.where(others.sum(0) > 0, weights, 1.0)
    return v / v.sum(1).mean().clamp_min(torch.finfo(grams.dtype).tiny)


@dataclass(frozen=True)
class SharedLayer:
    """One layer's coefficients, (columns,) float32 for each of the n LoRAs in turn.

    relative_error: Σ_r v_r ‖Σ_k m_k a_k − a_r‖² over all columns, as a share of the direct merge's; 1 where that is 0.
    """

    coefficients: list[Tensor]
    relative_error: float


def share(factors: Sequence[Factors], ridge: float = RIDGE, active: Tensor | None = None) -> SharedLayer:
    """The minimum above for one layer: ones for a single LoRA, or where no feature is active.

    active: E_r[x²] (columns, n) on the factors' device, None for ones.
    """
    grams = column_grams(factors)
    v = shares(grams, None if active is None else active.double())
    weighted, aimed = v.sum(1)[:, None, None] * grams, grams @ v[..., None]
    sizes = weighted.diagonal(dim1=1, dim2=2)
    q = sizes[:, grams.diagonal(dim1=1, dim2=2).any(0)].mean().nan_to_num().clamp_min(torch.finfo(torch.float64).tiny)
    identity = torch.eye(len(factors), dtype=grams.dtype, device=grams.device)
    solution = torch.linalg.solve(weighted + ridge * q * identity, aimed + ridge * q)

    def error(m: Tensor) -> float:
        return float((m.mT @ (weighted @ m - 2 * aimed)).sum() + (v * grams.diagonal(dim1=1, dim2=2)).sum())

    direct = error(torch.ones_like(solution))
    relative_error = max(error(solution), 0.0) / direct if direct > 0 else 1.0
    return SharedLayer([m.to("cpu", torch.float32) for m in solution[..., 0].unbind(1)], relative_error)


@dataclass(frozen=True)
class SolvedLayer:
    """One layer is done: its name, its number (from 1) of `layers`, its error as a share of the direct merge's."""

    name: str
    index: int
    layers: int
    relative_error: float


def everywhere(name: str, layer: Layer) -> None:
    """Every feature is as active as any other."""


def merge(
    loras: LoRASet,
    ridge: float = RIDGE,
    active: Callable[[str, Layer], Tensor | None] = everywhere,
    on_layer: Callable[[SolvedLayer], None] | None = None,
    device: torch.device | str = "cpu",
) -> Coefficients:
    """The coefficients of every layer. ridge: the larger, the nearer to the direct merge.

    active: E_r[x²] (columns, n) of a layer, on any device; None for the weights alone. `on_layer` is called after each
    layer; what it raises ends the run. device: where it is computed, in float64 in part. Raises FloatingPointError,
    naming the layer, where numbers are not finite.
    """
    by_concept: dict[str, dict[str, Tensor]] = {concept: {} for concept in loras.concepts}
    with torch.inference_mode(False), torch.no_grad():
        for index, (name, layer) in enumerate(loras.layers.items(), 1):
            solved = share_layer(name, layer, ridge, active(name, layer), device)
            for concept, m in zip(layer, solved.coefficients, strict=True):
                by_concept[concept][name] = m
            if on_layer is not None:
                on_layer(SolvedLayer(name, index, len(loras.layers), solved.relative_error))
    return Coefficients(by_concept)


def share_layer(
    name: str, layer: Layer, ridge: float, active: Tensor | None, device: torch.device | str
) -> SharedLayer:
    """`share` of a set's layer, computed on a device. Raises FloatingPointError as `merge` does."""
    factors = [Factors(f.up.to(device), f.down.to(device), f.scale) for f in layer.values()]
    solved = share(factors, ridge, None if active is None else active.to(device))
    if not all(m.isfinite().all() for m in solved.coefficients):
        raise not_finite(name, "do")
    return solved


def not_finite(name: str, verb: str) -> FloatingPointError:
    """Of a layer. verb: which of the LoRAs' numbers it is, "do" or "see"."""
    return FloatingPointError(
        f"layer {name}: what the LoRAs {verb} there is not finite; look at the LoRA's numbers, or load the model in "
        "bf16 or fp32"
    )
