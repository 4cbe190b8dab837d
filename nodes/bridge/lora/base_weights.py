"""A model's weights as files change them: their shapes, and their numbers without what lies on them."""

from __future__ import annotations

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor

from ..network.weights import dequantized


def form(weight: Tensor, place: tuple[int, int, int] | None) -> Tensor:
    """A weight or the slice (axis, start, length) of one, without its numbers: some tensors say another shape than that
    of what they hold (ComfyUI-GGUF's)."""
    whole = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
    return whole if place is None else whole.narrow(*place)


def base_weight(model, key: str) -> Tensor:
    """A weight without the patches that the host may have written into it, in its stored dtype or float32."""
    loaded = [entry.model for entry in comfy.model_management.current_loaded_models if entry.model is not None]
    backups = [patcher.backup for patcher in loaded if patcher.model is model and key in patcher.backup]
    weight = backups[0][key].weight if backups else comfy.utils.get_attr(model, key)
    if weight.ndim < 2:
        return weight
    layer = comfy.utils.get_attr(model, key.rpartition(".")[0])
    weight = dequantized(weight, layer)
    scale = layer.__dict__.get("_parameters", {}).get("scale_weight")
    return weight if scale is None else weight.float() * scale.float()
