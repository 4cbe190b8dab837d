"""LoRA files as the host's loader is to see them: what it converts first, and names of which only ours know more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from comfy.lora_convert import convert_lora
from torch import Tensor

from ....ziplora_core import formats, other_kinds
from . import refusals
from .loras import LoRASource

_KOHYA_OFT = "oft_unet_"


def as_host_reads(source: LoRASource) -> tuple[LoRASource, set[str]]:
    """(The file as the host's loader has it before it looks for layers, the layers that it would not know so).

    kohya's OFT (sd-scripts, networks/oft.py) is the host's under another prefix, with alpha for each row. Raises
    LoRAFileError.
    """
    tensors, renamed = dict(source.tensors), set()
    for key in [key for key in tensors if key.startswith(_KOHYA_OFT)]:
        tensor = tensors.pop(key)
        blocks = source.tensors.get(f"{formats.layer_name(key)}.oft_blocks")
        if key.endswith(".alpha") and blocks is not None and blocks.ndim == 3:
            tensor = tensor.double() * blocks.shape[0] * blocks.shape[1]
        name = f"lora_unet_{key.removeprefix(_KOHYA_OFT)}"
        renamed.add(formats.layer_name(name))
        tensors[name] = tensor
    renamed |= other_kinds.present(tensors) | _with_singular_values(source, tensors)
    tensors = convert_lora(tensors)
    return (source if tensors.keys() == source.tensors.keys() else replace(source, tensors=tensors)), renamed


def _with_singular_values(source: LoRASource, tensors: dict[str, Tensor]) -> set[str]:
    """AdaLoRA (arXiv 2303.10512) as LoRA, in place: ΔW = B · diag(E) · A. Its layers. Raises LoRAFileError."""
    layers = other_kinds.present(tensors, other_kinds.ADALORA)
    for layer, ending in ((layer, ending) for layer in layers for ending in other_kinds.ADALORA):
        name = layer + ending.replace("_E", "_A")
        values, right = tensors.pop(layer + ending, None), tensors.get(name)
        if values is None or right is None:
            continue
        if right.ndim != 2 or values.numel() != len(right):
            why = f"its {values.numel()} singular values are not those of a matrix {tuple(right.shape)}"
            raise refusals.broken(source, layer, why)
        tensors[name] = values.float().reshape(-1, 1) * right.float()
    return layers


def magnitude(tensors: Mapping[str, Tensor], layer: str) -> Tensor | None:
    """peft's DoRA scale of a layer; None where it has none."""
    return next((tensors[layer + ending] for ending in formats.MAGNITUDES if layer + ending in tensors), None)
