"""A merge as one ordinary LoRA: exact, or cut to a smaller rank without ever forming ΔW."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .files import all_finite
from .lora_set import Layer, column_view, on_one_up
from .merge import one_lora

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ExportLayer:
    """One layer of a LoRA file: ΔW = up · down. up (out, rank), down (rank, in, *kernel); a file's alpha is its rank.

    kept: share of ‖ΔW‖² that is left of the whole merge; 1 where nothing was cut.
    """

    up: Tensor
    down: Tensor
    kept: float = 1.0

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def whole(layer: Layer, coefficients: Mapping[str, Tensor], dtype: torch.dtype) -> ExportLayer:
    """The merge of a layer at its `joined_rank`, in a file's dtype: `merge.one_lora`, rounded once.

    coefficients: concept -> (columns,), all ones where there is none. One pass over each number, nothing in between.
    """
    if on_one_up(layer):
        up, down = one_lora(layer, coefficients)
        return ExportLayer(up.to(dtype), down.to(dtype))
    out, *columns = next(iter(layer.values())).shape
    rank = sum(f.rank for f in layer.values())
    up, down = torch.empty(out, rank, dtype=dtype), torch.empty(rank, *columns, dtype=dtype)
    start = 0
    for concept, f in layer.items():
        part = slice(start, start + f.rank)
        m = coefficients.get(concept)
        m = torch.ones(f.columns) if m is None else m.float()
        torch.mul(_arithmetic(f.up), torch.full((1, 1), f.scale), out=up[:, part])
        torch.mul(_arithmetic(f.down), column_view(m, f.down), out=down[part])
        start += f.rank
    return ExportLayer(up, down)


def _arithmetic(factor: Tensor) -> Tensor:
    """float8 has no arithmetic of its own."""
    return factor if factor.element_size() > 1 else factor.float()


def cut(up: Tensor, down: Tensor, rank: int) -> ExportLayer:
    """The best approximation of up · down of a smaller rank, by an SVD of the factors' triangles.

    QR of both factors, then an SVD of an (R, R) matrix, in float64; the singular values' roots go to both sides.
    rank 0, or one that is not smaller than R, leaves the factors as they are. Returns them in the dtype of `up`.
    """
    if not 0 < rank < down.shape[0]:
        return ExportLayer(up, down)
    left, upper = torch.linalg.qr(up.double())
    right, lower = torch.linalg.qr(down.double().flatten(1).T)
    u, values, vh = torch.linalg.svd(upper @ lower.T)
    roots = values[:rank].sqrt()
    energy = values.square()
    whole = energy.sum().item()
    return ExportLayer(
        ((left @ u[:, :rank]) * roots).to(up.dtype),
        (roots[:, None] * (vh[:rank] @ right.T)).reshape(-1, *down.shape[1:]).to(up.dtype),
        energy[:rank].sum().item() / whole if whole else 1.0,
    )


def rounded(name: str, layer: ExportLayer, dtype: torch.dtype) -> ExportLayer:
    """A layer in a file's dtype, contiguous. Raises ValueError, with its name, where its numbers do not fit."""
    return ExportLayer(fitting(name, layer.up, dtype), fitting(name, layer.down, dtype), layer.kept)


def fitting(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of layer `name` in a file's dtype, contiguous. Raises ValueError where its numbers do not fit."""
    converted = tensor.to(dtype).contiguous()
    if not all_finite(converted):
        raise ValueError(f"layer '{name}' holds numbers too large for {dtype}; export as bf16 or fp32")
    return converted


def kohya_tensors(layers: Mapping[str, ExportLayer]) -> dict[str, Tensor]:
    """Tensors in kohya's form, alpha = rank. layers: kohya's layer name -> layer."""
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{name}.lora_up.weight"] = _like_down(layer)
        tensors[f"{name}.lora_down.weight"] = layer.down
        tensors[f"{name}.alpha"] = torch.tensor(float(layer.rank))
    return tensors


def peft_tensors(layers: Mapping[str, ExportLayer]) -> dict[str, Tensor]:
    """Tensors in peft's form, which diffusers reads; no alpha stands for alpha = rank. layers: module name -> layer."""
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{name}.lora_A.weight"] = layer.down
        tensors[f"{name}.lora_B.weight"] = _like_down(layer)
    return tensors


def _like_down(layer: ExportLayer) -> Tensor:
    """`up` with as many axes as `down`: (out, rank, 1, 1) for a convolution."""
    return layer.up.reshape(*layer.up.shape, *[1] * (layer.down.ndim - 2))
