"""A merge by the weights alone: strong columns share their place, weak ones stay. No picture, prompt or model pass.

With a_k the column of LoRA k's update in one layer, and m_k its coefficient, the merged column should be, for inputs of
no preferred direction, what each LoRA alone adds:

    min over m of  Σ_k w_k ‖Σ_i m_i a_i − a_k‖²  +  ridge · g · Σ_k w_k · ‖m − 1‖²

w_k is one over what the other LoRAs add in that layer, ‖Σ_{i≠k} ΔW_i‖², and g the mean of all ‖a_i‖² there. With the
Gram matrix G of the columns and the shares ω_k = w_k / Σ w, the minimum is (G + ridge · g)⁻¹ (G ω + ridge · g · 1): ω
where columns are strong, 1 where they are weak. It is the layer-wise solve (`layerwise`) with the identity in the place
of the inputs' second moments.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def shares(grams: Tensor) -> Tensor:
    """ω (n,): each LoRA's weight in a layer, as much as the others' update is small beside its own. Adds up to one.

    grams: (columns, n, n). Where the others add nothing a LoRA has all of it; where nobody adds anything, equal parts.
    """
    total = grams.sum(0)
    count = len(total)
    others = 1 - torch.eye(count, dtype=total.dtype, device=total.device)
    disturbance = torch.einsum("ki,ij,kj->k", others, total, others).clamp_min(0)
    silent = disturbance <= torch.finfo(total.dtype).eps * total.diagonal().sum()
    weights = silent.to(total.dtype) if silent.any() else 1 / disturbance
    return weights / weights.sum()


def layer_coefficients(factors: Sequence[Factors], ridge: float = RIDGE) -> list[Tensor]:
    """One layer's coefficients, (columns,) float32 for each of the n LoRAs in turn; ones for a single LoRA."""
    grams = column_grams(factors)
    omega = shares(grams)
    shift = ridge * grams.diagonal(dim1=1, dim2=2).mean().clamp_min(torch.finfo(torch.float64).tiny)
    shifted = grams + shift * torch.eye(len(omega), dtype=grams.dtype, device=grams.device)
    wanted = (grams @ omega + shift)[..., None]
    solution = torch.linalg.solve(shifted, wanted)[..., 0]
    return [solution[:, i].to("cpu", torch.float32) for i in range(len(omega))]


def merge(loras: LoRASet, ridge: float = RIDGE) -> Coefficients:
    """The coefficients of every layer. ridge: the larger, the nearer to the direct merge, which has all ones.

    Raises FloatingPointError where a layer's numbers are not finite.
    """
    found: dict[str, dict[str, Tensor]] = {concept: {} for concept in loras.concepts}
    with torch.inference_mode(False), torch.no_grad():
        for name, layer in loras.layers.items():
            for concept, m in zip(layer, layer_coefficients(list(layer.values()), ridge), strict=True):
                if not m.isfinite().all():
                    raise FloatingPointError(
                        f"layer {name}: what the LoRAs do there is not finite; look at the LoRA's numbers"
                    )
                found[concept][name] = m
    return Coefficients(found)
