"""Kinds of update that only their library knows: OFT of peft and OneTrainer, IA³, AdaLoRA and VeRA of peft."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

OFT = (".oft_R", ".oft_R.weight", ".oft_R.default.weight")
IA3 = (".ia3_l", ".ia3_l.default")
ADALORA = (".lora_E", ".lora_E.default")
VERA = (".vera_lambda_b", ".vera_lambda_d")
TERMS, AXIS = ".oft_terms", ".ia3_axis"  # of a layer, where its library's configuration says them
DEFAULT_TERMS = 5  # peft's, and what OneTrainer always takes
_MOST_TERMS = 100


def present(names: Iterable[str], endings: tuple[str, ...] = (*OFT, *IA3, *VERA)) -> set[str]:
    """The layers of a file that have a tensor with one of these endings."""
    return {key.removesuffix(end) for key in names for end in endings if key.endswith(end)}


def tensor_of(tensors: Mapping[str, Tensor], layer: str, endings: tuple[str, ...]) -> Tensor | None:
    return next((tensors[layer + ending] for ending in endings if layer + ending in tensors), None)


def terms_of(said: Tensor | None) -> int:
    """Terms of `rotations` that a file names, the default where it names none that can be."""
    number = said.item() if said is not None and said.numel() == 1 else DEFAULT_TERMS
    return int(number) if number in range(_MOST_TERMS + 1) else DEFAULT_TERMS


def rotations(vectors: Tensor, terms: int = DEFAULT_TERMS) -> Tensor:
    """Blocks R (n, b, b) of OFT (arXiv 2306.07280) in Cayley's form, of the numbers above the diagonals of Q = −Qᵀ.

    vectors: (n, b · (b − 1) / 2). terms: of peft's series for (I + Q)(I − Q)⁻¹; 0 for peft's inverse,
    (I − Q)(I + Q)⁻¹, which turns the other way. Raises ValueError where the numbers fill no triangle.
    """
    side = block_side(vectors.shape[1])
    if side is None:
        raise ValueError(f"{vectors.shape[1]} numbers are no triangle of a matrix")
    rows, columns = torch.triu_indices(side, side, 1)
    skew = vectors.new_zeros(len(vectors), side, side)
    skew[:, rows, columns] = vectors
    skew = skew - skew.transpose(1, 2)
    unit = torch.eye(side, dtype=skew.dtype, device=skew.device).expand_as(skew)
    if not terms:
        inverse: Tensor = torch.linalg.solve(unit + skew, unit - skew, left=False)
        return inverse
    whole, power = unit.clone(), unit
    last = max(terms - 1, 3) if terms > 2 else 0  # the power that counts once: peft never ends at the second
    for exponent in range(1, (last or terms - 1) + 1):
        power = power @ skew
        whole = whole + (1 if exponent == last else 2) * power
    return whole


def block_side(numbers: int) -> int | None:
    """Rows of the matrix that has so many numbers above its diagonal; None where none has."""
    side = (1 + math.isqrt(1 + 8 * numbers)) // 2
    return side if side * (side - 1) // 2 == numbers else None


def turned(weight: Tensor, blocks: Tensor) -> Tensor:
    """W · diag(R)ᵀ − W: columns are turned in blocks, by one block over and over where there is only one.

    weight: (out, in, *kernel). blocks: (n, b, b) with n · b columns, or (1, b, b).
    """
    rows = weight.flatten(1)
    parts = rows.reshape(len(rows), -1, blocks.shape[1])
    blocks = blocks.expand(parts.shape[1], -1, -1)
    return (torch.einsum("onb,ncb->onc", parts, blocks).flatten(1) - rows).reshape(weight.shape)


def constrained(vectors: Tensor, eps: float) -> Tensor:
    """COFT: numbers as `rotations` takes them, such that ‖Q‖ of each block is at most eps / √n."""
    most = eps / math.sqrt(len(vectors))
    norms = math.sqrt(2) * vectors.double().norm(dim=1, keepdim=True)
    return torch.where(norms <= most, vectors.double(), vectors.double() * (most / norms)).to(vectors.dtype)


def settled(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """(Tensors of a file with what peft's configuration alone says of them, the same by name, where it is no default).

    config: the table of `adapter_config.json`; another kind's, or an empty one, says nothing. Raises nothing.
    """
    found, said = dict(tensors), dict[str, float]()
    kind = config.get("peft_type")
    if kind == "OFT":
        terms = config.get("num_cayley_neumann_terms", DEFAULT_TERMS)
        terms = 0 if config.get("use_cayley_neumann") is False else terms
        if type(terms) is int and 0 <= terms <= _MOST_TERMS and terms != DEFAULT_TERMS:
            said |= {f"{layer}{TERMS}": float(terms) for layer in present(tensors, OFT)}
        eps = config.get("eps")
        if config.get("coft") is True and isinstance(eps, float | int) and 0 < eps < math.inf:
            for key in [key for key in tensors if key.endswith(OFT) and tensors[key].ndim == 2 and len(tensors[key])]:
                found[key], said[f"{key} within"] = constrained(tensors[key], eps), float(eps)
    if kind == "IA3":
        feedforward = config.get("feedforward_modules") or []
        if isinstance(feedforward, list) and all(isinstance(name, str) for name in feedforward):
            for layer in present(tensors, IA3):
                said[f"{layer}{AXIS}"] = float(layer.endswith(tuple(feedforward)))
    found |= {key: torch.tensor(value) for key, value in said.items() if key.endswith((TERMS, AXIS))}
    return found, said
