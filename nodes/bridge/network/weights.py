"""A layer's weight as the host would use it: cast, patched, dequantized."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.rmsnorm
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor


def compute_dtype(model) -> torch.dtype:
    """The dtype in which the host runs this BaseModel's network."""
    return model.manual_cast_dtype or model.get_dtype()


_PLAIN = (None, 0, 1)  # no tensor of ComfyUI-GGUF's; ggml's numbers of float32 and float16
_QUANTIZED = getattr(comfy.ops, "QuantizedTensor", ())  # absent from older hosts


@contextlib.contextmanager
def cast(module: Any, like: Tensor) -> Iterator[tuple[Any, Tensor | None]]:
    """The module's weight and bias as the host would use them for `like`; valid inside the block only."""
    if module.weight is None:
        yield None, None
    elif _writes_out(module):
        yield module.cast_bias_weight(dtype=like.dtype, device=like.device, bias_dtype=like.dtype)
    elif isinstance(module, comfy.ops.CastWeightBiasOp) and _is_cast(module):
        weight, bias, stream = comfy.ops.cast_bias_weight(
            module, dtype=like.dtype, bias_dtype=like.dtype, device=like.device, offloadable=True
        )
        try:
            yield _whole(module, weight), bias
        finally:
            comfy.ops.uncast_bias_weight(module, weight, bias, stream)
    else:
        yield module.weight.to(like), None if module.bias is None else module.bias.to(like)


def _whole(module: torch.nn.Module, weight: Tensor) -> Tensor:
    """What a layer multiplies its input with: dequantized, with the scales that its forward uses apart from it."""
    weight = dequantized(weight)
    scale, smoothing = (getattr(module, name, None) for name in ("scale_weight", "pre_quant_scale"))
    weight = weight if scale is None else weight * scale.to(weight)
    return weight if smoothing is None else weight * smoothing.to(weight)  # of each column of the input


def is_quantized(weight: Tensor) -> bool:
    """Whether it is the host's own kind of tensor, which stands for other numbers than it holds."""
    return isinstance(weight, _QUANTIZED)


def is_coded(weight: Tensor) -> bool:
    """Whether a tensor stands for other numbers than it holds: the host's own kind, or ComfyUI-GGUF's."""
    return is_quantized(weight) or getattr(weight, "tensor_type", None) not in _PLAIN


def dequantized(weight: Tensor, module: Any = None) -> Tensor:
    """The numbers that a weight stands for, as ordinary floats, without LoRAs that lie on the tensor itself.

    module: the layer that it is of, where that may be another pack's.
    """
    if is_quantized(weight):
        return weight.dequantize()
    kind: Any = getattr(weight, "tensor_type", None)
    if kind is None or not _writes_out(module):
        return weight
    alone: Any = weight.data
    alone.tensor_type, alone.tensor_shape, alone.patches = kind, weight.shape, []
    numbers: Tensor = module.get_weight(alone, torch.float32)
    return numbers


def _writes_out(module: Any) -> bool:
    """Whether a layer makes its weight itself, as ComfyUI-GGUF's do, of a tensor that no other code can read."""
    return hasattr(module, "cast_bias_weight") and hasattr(module, "get_weight")


def _is_cast(module: comfy.ops.CastWeightBiasOp) -> bool:
    """Whether the host itself would cast or change this layer's weight in its forward, or use it as it is."""
    return bool(module.comfy_cast_weights or module.weight_function or module.bias_function or _is_coded(module))


def _is_coded(module: Any) -> bool:
    return is_quantized(module.weight) or getattr(module, "scale_weight", None) is not None
