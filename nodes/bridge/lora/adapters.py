"""The host's kinds of LoRA updates: what each is called, and whether it has the size of a weight.

Sizes are told from shapes alone, nothing is computed: small matrices that do not belong to a layer can make something
huge.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from comfy.weight_adapter import LoRAAdapter
from torch import Tensor

from .own_adapters import OwnAdapter


def is_low_rank(patch: Any) -> bool:
    """Whether a patch of the host is up · down and nothing else: no DoRA scale, no change of shape."""
    return isinstance(patch, LoRAAdapter) and patch.weights[4] is None and patch.weights[5] is None


def reshapes(patch: Any) -> bool:
    return isinstance(patch, LoRAAdapter) and patch.weights[5] is not None


def is_plain(patch: Any) -> bool:
    """Without a Tucker core too: nothing is computed to learn what it fits."""
    return is_low_rank(patch) and patch.weights[3] is None


def kind_of(patch: Any) -> str:
    if isinstance(patch, tuple):
        return "weight differences"
    kind = _KINDS.get(patch.name)
    if kind is None:
        return patch.name
    return kind.title if patch.weights[kind.scale] is None else "DoRA"


def scale_of(patch: Any) -> Tensor | None:
    """A patch's DoRA scale; None where it has none."""
    kind = None if isinstance(patch, tuple) else _KINDS.get(patch.name)
    return None if kind is None else patch.weights[kind.scale]


def without_scale(patch: Any) -> Any:
    """The same update before its DoRA scale."""
    if scale_of(patch) is None:
        return patch
    place = _KINDS[patch.name].scale
    return type(patch)(patch.loaded_keys, (*patch.weights[:place], None, *patch.weights[place + 1 :]))


def plainer(patch: Any) -> Any:
    """A LoKr without its Tucker core, which is worked into the second factor: the host fails at the product of both.

    w2[p, r, k] = alpha / rank · Σ_ij t2[i, j, k] · w2_a[i, p] · w2_b[j, r]
    """
    if isinstance(patch, tuple) or patch.name != "lokr" or patch.weights[7] is None or patch.weights[1] is not None:
        return patch
    one, _, alpha, a, b, left, right, core, scale = patch.weights
    if None in (left, right) or min(left.ndim, right.ndim, core.ndim) < 2 or not right.shape[0]:
        return patch
    try:
        whole = torch.einsum("ij...,ip,jr->pr...", *(m.double() for m in (core, left, right)))
    except RuntimeError:
        return patch  # what does not multiply is refused for its shapes
    whole = whole * (1.0 if alpha is None else alpha / right.shape[0])
    return type(patch)(patch.loaded_keys, (one, whole.contiguous(), None, a, b, None, None, None, scale))


def precision(patch: Any) -> torch.dtype:
    """In which the host can compute an update: rotations take an inverse in float32."""
    return torch.float32 if not isinstance(patch, tuple) and patch.name in ("oft", "boft") else torch.float64


def turns_nothing(patch: Any) -> bool:
    """Whether an OFT or BOFT leaves a weight as it is, as blocks of size 1 must: no part of a block is skew.

    A factor for each row that is beside it counts for more.
    """
    if isinstance(patch, tuple) or patch.name not in ("oft", "boft"):
        return False
    blocks = patch.weights[0]
    return bool(torch.equal(blocks, blocks.transpose(-1, -2)))


def all_used(patch: Any) -> bool:
    """Whether no matrix of an update is all zeros, as one is that was never trained."""
    weights = patch[1] if isinstance(patch, tuple) else patch.weights
    return all(bool(w.any()) for w in weights if isinstance(w, Tensor))


def fits(patch: Any, shape: torch.Size) -> bool:
    """Whether the host can add an update, as its loader reads one from a file, to a weight of this shape."""
    if isinstance(patch, tuple):
        return bool(patch[1][0].shape == shape)
    if isinstance(patch, OwnAdapter):
        return len(shape) > 1 and patch.fits(shape)
    kind = _KINDS.get(patch.name)
    scale = None if kind is None else patch.weights[kind.scale]
    if len(shape) < 2 or (scale is not None and scale.numel() not in shape[:2]):
        return False
    return kind is None or kind.makes(patch.weights, shape)


def _elements(left: Tensor | None, right: Tensor | None, core: Tensor | None = None, turned: bool = False) -> int:
    """Of left (out, r) · right (r, in, *kernel), or with a Tucker core (r, q, *kernel) between; 0 for no product.

    turned: with a core, left is (r, out), as LyCORIS keeps it.
    """
    if left is None or right is None or min(left.ndim, right.ndim) < 2:
        return 0
    rows, rank = left.shape[0], math.prod(left.shape[1:])
    if core is None:
        return rows * math.prod(right.shape[1:]) if rank and rank == right.shape[0] else 0
    if turned:
        rows, rank = rank, rows
    if not rank or core.ndim < 2 or core.shape[:2] != (rank, right.shape[0]):
        return 0
    return rows * math.prod(right.shape[1:]) * math.prod(core.shape[2:])


def _lora(parts: tuple, shape: torch.Size) -> bool:
    return _elements(parts[0], parts[1], parts[3]) == shape.numel()


def _loha(parts: tuple, shape: torch.Size) -> bool:
    a, b, _, c, d, first, second, _ = parts
    return _elements(a, b, first, True) == _elements(c, d, second, True) == shape.numel()


def _lokr(parts: tuple, shape: torch.Size) -> bool:
    one, two, _, a, b, c, d, core, _ = parts
    left = _elements(a, b) if one is None else one.numel()
    right = _elements(c, d, core, True) if two is None else two.numel()
    return left * right == shape.numel()


def _glora(parts: tuple, shape: torch.Size) -> bool:
    a1, a2, b1, b2, *_ = parts
    return any(  # two generations of files, which differ in the order
        _elements(a, b) in (shape[1] ** 2, math.prod(shape[1:]) ** 2) and _elements(c, d) == shape.numel()
        for a, b, c, d in ((a1, a2, b1, b2), (a2, a1, b2, b1))
    )


def _blocks(parts: tuple, shape: torch.Size) -> bool:
    """OFT (n, b, b) and BOFT (m, n, b, b): n · b rows, and a factor for each row at most."""
    blocks, rescale, *_ = parts
    *_, number, side, other = blocks.shape
    return side == other and number * side == shape[0] and (rescale is None or rescale.numel() == shape[0])


@dataclass(frozen=True)
class Kind:
    """A kind of adapter of the host.

    title: for reports. scale: where among its weights a DoRA scale stands. makes: whether its weights make an update
    of a shape.
    """

    title: str
    scale: int
    makes: Callable[[tuple, torch.Size], bool]


_KINDS = {  # by the host's names
    "lora": Kind("LoRA", 4, _lora),
    "loha": Kind("LoHa", 7, _loha),
    "lokr": Kind("LoKr", 8, _lokr),
    "glora": Kind("GLoRA", 5, _glora),
    "oft": Kind("OFT", 3, _blocks),
    "boft": Kind("BOFT", 3, _blocks),
}
