"""Updates that the host has no adapter for, as patches that its own code can compute: their layers found by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from comfy.weight_adapter import LoRAAdapter
from comfy.weight_adapter.base import WeightAdapterBase
from torch import Tensor

from ....ziplora_core import other_kinds
from ....ziplora_core.files import LoRAFileError
from . import refusals
from .base_weights import form
from .loras import LoRASource

Targets = Mapping[str, str | tuple]


class OwnAdapter(WeightAdapterBase):
    """An update that is computed from the weight.

    name: for reports. weights: what was trained, zeros where nothing was.
    """

    def __init__(self, *weights: Tensor) -> None:
        self.loaded_keys: set[str] = set()
        self.weights = weights

    def fits(self, shape: torch.Size) -> bool:
        """Whether it can be of a weight of this shape (out, in, *kernel)."""
        raise NotImplementedError

    def delta(self, weight: Tensor) -> Tensor:
        """ΔW of a weight in the file's order of rows, in its precision."""
        raise NotImplementedError

    def calculate_weight(
        self, weight, key, strength, strength_model, offset, function, intermediate_dtype=None, original_weight=None
    ):
        """As the host asks its adapters: changes the weight, and gives it back. function: swaps rows, both ways."""
        weight += function(strength * self.delta(function(weight)))
        return weight


class Rotation(OwnAdapter):
    """OFT of peft and OneTrainer. weights: (vectors of `other_kinds.rotations`,)."""

    name = "OFT"

    def __init__(self, vectors: Tensor, terms: int) -> None:
        super().__init__(vectors)
        self.terms = terms

    def fits(self, shape: torch.Size) -> bool:
        (vectors,) = self.weights
        side = other_kinds.block_side(vectors.shape[1]) if vectors.ndim == 2 and len(vectors) else None
        columns = shape[1:].numel()
        return side is not None and (columns == side * len(vectors) or (len(vectors) == 1 and columns % side == 0))

    def delta(self, weight: Tensor) -> Tensor:
        vectors = self.weights[0].to(weight.device, weight.dtype)
        return other_kinds.turned(weight, other_kinds.rotations(vectors, self.terms))


class Rescaling(OwnAdapter):
    """IA³ of peft (arXiv 2205.05638): ΔW = W ⊙ (l − 1). weights: (l − 1,), of rows (axis 0) or columns (1)."""

    name = "IA³"

    def __init__(self, factors: Tensor, axis: int) -> None:
        super().__init__(factors.flatten().double() - 1)
        self.axis = axis

    def fits(self, shape: torch.Size) -> bool:
        return self.weights[0].numel() == shape[self.axis]

    def delta(self, weight: Tensor) -> Tensor:
        shape = [1] * weight.ndim
        shape[self.axis] = -1
        return weight * self.weights[0].to(weight.device, weight.dtype).reshape(shape)


def patches(
    source: LoRASource, model, names: Targets, parameter: Callable[[str], Tensor | None], base: Callable[[str], Tensor]
) -> dict[str | tuple, Any]:
    """Weight, or slice of one, -> the update that a file has of it in such a kind.

    model: the host's BaseModel. names: how files call its layers -> their targets. parameter: a weight or bias by
    name; None where there is none. base: what it is without patches. Raises LoRAFileError where a file lacks what an
    update is made of.
    """
    found: dict[str | tuple, Any] = {}
    tensors = source.tensors
    for layer in other_kinds.present(tensors).intersection(names):
        target = names[layer]
        key, place = (target, None) if isinstance(target, str) else target[:2]
        weight = parameter(key)
        if weight is None or weight.ndim < 2:
            continue
        shape = form(weight, place).shape
        vectors = other_kinds.tensor_of(tensors, layer, other_kinds.OFT)
        factors = other_kinds.tensor_of(tensors, layer, other_kinds.IA3)
        if vectors is not None:
            found[target] = Rotation(vectors, other_kinds.terms_of(tensors.get(layer + other_kinds.TERMS)))
        elif factors is not None:
            found[target] = patch = Rescaling(factors, _axis(source, layer, factors, shape))
            if not patch.axis and patch.fits(shape):
                _add_bias(found, target, patch, parameter, base)
        else:
            found[target] = _vera(source, model, layer, key, shape)
    return found


def _axis(source: LoRASource, layer: str, factors: Tensor, shape: torch.Size) -> int:
    """Whether IA³'s factors are of rows (0) or columns (1): a matrix says it by its shape, a convolution's where it has
    not as many of both; else peft's configuration."""
    if factors.ndim == 2 and len(shape) == 2 and max(factors.shape) > 1:
        return int(factors.shape[0] == 1)
    if shape[0] != shape[1]:
        return int(factors.numel() == shape[1])
    said = source.tensors.get(layer + other_kinds.AXIS)
    if said is None or said.numel() != 1:
        raise LoRAFileError(
            f"'{source.title}' does not say whether IA³ scales what goes into layer '{layer}' or what comes out of it; "
            "put it and the 'adapter_config.json' that peft wrote with it into a folder of their own"
        )
    return int(said.item() != 0)


def _add_bias(
    found: dict[str | tuple, Any],
    target: str | tuple,
    patch: Rescaling,
    parameter: Callable[[str], Tensor | None],
    base: Callable[[str], Tensor],
) -> None:
    """What comes out of a layer is its bias too."""
    key, place, swap = (target, None, None) if isinstance(target, str) else (*target, None)[:3]
    name = key.removesuffix(".weight") + ".bias"
    if not key.endswith(".weight") or parameter(name) is None:
        return
    bias = base(name).to("cpu").double()
    part = bias if place is None else bias.narrow(*place)
    delta = patch.delta(part if swap is None else swap(part))
    whole = torch.zeros_like(bias)
    (whole if place is None else whole.narrow(*place)).copy_(delta if swap is None else swap(delta))
    before = found.get(name)
    found[name] = ("diff", (whole.float() if before is None else before[1][0] + whole.float(),))


def _vera(source: LoRASource, model, layer: str, key: str, shape: torch.Size) -> LoRAAdapter:
    """VeRA (arXiv 2310.11454): ΔW = diag(b) · B · diag(d) · A, all layers taking what they need of one A and B."""
    tensors = source.tensors
    shared = [next((t for name, t in tensors.items() if name.endswith(f"vera_{which}")), None) for which in "AB"]
    if any(matrix is None for matrix in shared):
        raise LoRAFileError(
            f"'{source.title}' holds VeRA without the matrices that its layers share (vera_A, vera_B), which peft "
            "keeps in the file with save_projection=True alone; save it so, or merge it with peft and extract a LoRA"
        )
    right, left = (matrix.float() for matrix in shared if matrix is not None)
    scale_up, scale_down = (tensors[layer + ending].float() for ending in other_kinds.VERA)
    fit = right.ndim == left.ndim == 2 and scale_down.numel() == len(right) == left.shape[1]
    if not fit or len(shape) != 2 or scale_up.numel() != shape[0] or len(left) < shape[0] or right.shape[1] < shape[1]:
        raise refusals.other_model(source, model, key, "VeRA", shape)
    up, down = scale_up.reshape(-1, 1) * left[: shape[0]], scale_down.reshape(-1, 1) * right[:, : shape[1]]
    return LoRAAdapter(set(), (up, down, None, None, None, None))
