"""Coefficients in a file of their own, bound to the two LoRA files by hash."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .coefficients import Coefficients
from .files import LoRAFileError, OpenFile, opened, shown
from .pair import LoRAPair
from .writing import write_tensors

FORMAT = "ziplora 1"
_KEY = "ziplora"  # in the file's metadata: everything but the numbers, as JSON


@dataclass(frozen=True)
class SavedLoRA:
    """Which file a concept's coefficients belong to. sha256, size: of the whole file. strength: it is used at."""

    name: str
    sha256: str
    size: int
    strength: float

    def __post_init__(self) -> None:
        """Raises ValueError or TypeError for what a file does not say so."""
        texts = isinstance(self.name, str) and isinstance(self.sha256, str)
        if not (texts and isinstance(self.size, int) and math.isfinite(self.strength)):
            raise ValueError("expected a name, a hash, a size and a strength")


@dataclass(frozen=True)
class SavedZip:
    """Everything that makes a zipped pair again from its two LoRA files.

    dials: content and style strength already in the coefficients. versions: of the pack and the host.
    """

    content: SavedLoRA
    style: SavedLoRA
    dials: tuple[float, float]
    method: str
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    report: str = ""
    format: str = FORMAT

    def __post_init__(self) -> None:
        """Raises ValueError or TypeError for what a file does not say so."""
        texts = isinstance(self.method, str) and isinstance(self.report, str)
        tables = isinstance(self.settings, Mapping) and isinstance(self.versions, Mapping)
        if not (texts and tables and all(map(math.isfinite, self.dials))):
            raise ValueError("expected dials, a method, settings, versions and a report")


def write(
    path: str | os.PathLike[str],
    coefficients: Coefficients,
    about: SavedZip,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a file atomically: float32 vectors `content.<layer>` and `style.<layer>`. metadata: more of it.

    Returns where it is, and raises OSError, as `whole_or_not_at_all` does.
    """
    sides = {"content": coefficients.content, "style": coefficients.style}
    tensors = {f"{concept}.{name}": m.float() for concept, side in sides.items() for name, m in side.items()}
    return write_tensors(path, tensors, {**(metadata or {}), _KEY: json.dumps(asdict(about))})


def read_about(path: str | os.PathLike[str]) -> SavedZip:
    """What a file says of itself, from its header alone. Raises LoRAFileError as `read` does, but for numbers."""
    with opened(path) as file:
        return _about(file)


def read(path: str | os.PathLike[str]) -> tuple[Coefficients, SavedZip]:
    """Raises LoRAFileError for a file that is cut off, no file of this pack, or of a format that it does not know."""
    sides: dict[str, dict[str, torch.Tensor]] = {"content": {}, "style": {}}
    with opened(path) as file:
        about = _about(file)
        for key, m in file.tensors():
            concept, _, name = key.partition(".")
            if not bool(torch.isfinite(m).all()):
                raise _unusable(file, key)
            sides[concept][name] = m
    return Coefficients(sides["content"], sides["style"]), about


def _unusable(file: OpenFile, key: str) -> LoRAFileError:
    return LoRAFileError(
        f"'{file.name}' holds no usable coefficients at '{shown(key)}'; zip the pair again and save it anew"
    )


def _about(file: OpenFile) -> SavedZip:
    if _KEY not in file.metadata:
        raise LoRAFileError(f"'{file.name}' is no zipped pair: choose a file that Save Zipped LoRA wrote")
    try:
        found = json.loads(file.metadata[_KEY])
        if found["format"] != FORMAT:
            raise LoRAFileError(
                f"'{file.name}' has format '{shown(str(found['format']))}', this version reads '{FORMAT}'; "
                "update the pack"
            )
        content, style = (SavedLoRA(**found.pop(c)) for c in ("content", "style"))
        dials = found.pop("dials")
        about = SavedZip(content, style, (float(dials[0]), float(dials[1])), **found)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        if isinstance(error, LoRAFileError):
            raise
        raise LoRAFileError(f"'{file.name}' has broken metadata; zip the pair again and save it anew") from error
    for key, place in file.places.items():
        named = key.partition(".")[0] in ("content", "style")
        if not named or len(place.shape) != 1 or place.dtype != torch.float32:
            raise _unusable(file, key)
    return about


def check_fits(name: str, coefficients: Coefficients, pair: LoRAPair) -> None:
    """Raises LoRAFileError where coefficients are not those of a pair, naming the first layer that differs."""
    expected = Coefficients.ones(pair)
    sides = (("content", coefficients.content, expected.content), ("style", coefficients.style, expected.style))
    for concept, found, wanted in sides:
        for layer in [*wanted, *found]:
            here, there = (side[layer].numel() if layer in side else 0 for side in (found, wanted))
            if here != there:
                raise LoRAFileError(
                    f"'{name}' was zipped for another model: it has {here} {concept} coefficients for layer "
                    f"'{shown(layer)}', the LoRA has {there} columns there on this model; connect the model that it "
                    "was zipped on"
                )
