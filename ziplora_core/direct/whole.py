"""Updates of full rank: a merge that looks at single elements of ΔW leaves no low rank.

They are kept whole, as those of LoHa and LoKr files are, and not cut back to the sum of the ranks: what such a merge
does to a LoRA lies mostly outside of any few directions, so that a cut would be nearly the plain sum again (of two
random LoRAs of rank 16 in 1280 x 1280, TIES cut to rank 32 is .56 of itself away from TIES, and its cosine with the sum
is .95 instead of .78; DARE's .97 instead of .71). All LoRAs of a layer stand on one unit matrix, so that each keeps its
part, which Style Strength turns, and the merge has no larger a rank than rows. Two SDXL attention LoRAs of half
precision take 3.8 GB so.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from ..files import all_finite
from ..lora_set import Factors, Layer, LoRASet

Units = dict[tuple[int, torch.dtype], Tensor]  # by (rows, dtype), of all layers of a merge


def update(factors: Factors) -> Tensor:
    """ΔW (out, in · kernel) in float32."""
    return factors.scale * factors.up.float() @ factors.down.float().flatten(1)


def _dtype(layer: Layer) -> torch.dtype:
    """Half precision where all files of a layer have the same, else float32."""
    dtypes = {factors.down.dtype for factors in layer.values()}
    half = dtypes in ({torch.float16}, {torch.bfloat16})
    return reduce(torch.promote_types, dtypes) if half else torch.float32


def keep(layer: Layer, parts: Sequence[Tensor], units: Units) -> Layer:
    """The layer with these updates, one for each LoRA in its order, (out, in · kernel) float32.

    In the precision of the files; in float32 where a number does not fit it.
    """
    dtype = _dtype(layer)
    kept = [part.to(dtype) for part in parts]
    if not all(map(all_finite, kept)):
        dtype, kept = torch.float32, list(parts)
    rows = kept[0].shape[0]
    unit = units.setdefault((rows, dtype), torch.eye(rows, dtype=dtype))
    return {
        concept: Factors(unit, part.reshape(factors.shape))
        for (concept, factors), part in zip(layer.items(), kept, strict=True)
    }


def size(loras: LoRASet) -> int:
    """Bytes of all layers, kept so."""
    layers = sum(
        sum(f.up.shape[0] * f.down[0].numel() for f in layer.values()) * _dtype(layer).itemsize
        for layer in loras.layers.values()
    )
    units = {(next(iter(layer.values())).shape[0], _dtype(layer)) for layer in loras.layers.values()}
    return layers + sum(rows**2 * dtype.itemsize for rows, dtype in units)


def told(before: LoRASet, after: LoRASet) -> list[str]:
    return [
        f"updates are kept whole, {size(before) / 1e6:,.0f} MB: this merge has no low rank. For a small file give "
        "Export Merged LoRA a rank; its report says what that keeps"
    ]
