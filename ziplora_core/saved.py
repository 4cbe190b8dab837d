"""Coefficients in a file of their own, bound to their LoRA files by hash."""

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
from .lora_set import CONCEPTS, LoRASet
from .routing import Routing
from .writing import write_tensors

FORMAT = "ziplora 1"  # of a content and a style LoRA, each of one strength
FORMAT_OF_ANY = "ziplora 2"  # of any others: the same tensors; LoRAs and dials by concept, under "loras" and "dials"
FORMAT_ROUTED = "ziplora 3"  # of method ROUTED: as the one before, and a matrix (R, R) `routing.<layer>` of each layer
FORMAT_FUSED = "ziplora 4"  # of method FUSED: the same, but the downs (R, in, kernel) themselves
FORMATS = (FORMAT, FORMAT_OF_ANY, FORMAT_ROUTED, FORMAT_FUSED)
ROUTED, FUSED = "routed", "fused"
ROUTED_LAYERS = "routed_layers"  # among the settings of both: how many matrices there are
_ROUTING = "routing"
_KEY = "ziplora"  # in the file's metadata: everything but the numbers, as JSON


@dataclass(frozen=True)
class SavedLoRA:
    """Which file a concept's coefficients belong to. sha256, size: of the whole file. strength: it is used at;
    clip_strength: its text-encoder part, None for the same. config: a digest of the scales that its header or a file
    beside it gave its layers, "" where none did; None where older files do not say it."""

    name: str
    sha256: str
    size: int
    strength: float
    clip_strength: float | None = None
    config: str | None = None

    def __post_init__(self) -> None:
        """Raises ValueError or TypeError for what a file does not say so."""
        texts = isinstance(self.name, str) and isinstance(self.sha256, str)
        if not (
            texts
            and isinstance(self.config, str | None)
            and isinstance(self.size, int)
            and math.isfinite(self.strength)
            and math.isfinite(self.clip_strength or 0)
        ):
            raise ValueError("expected a name, a hash, a size and a strength")

    def as_table(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class SavedZip:
    """Everything that makes a merge again from its LoRA files.

    sources, dials: by concept, in the same order; dials: the strengths that are in the coefficients already. versions:
    of the pack and the host.
    """

    sources: Mapping[str, SavedLoRA]
    dials: Mapping[str, float]
    method: str
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    report: str = ""

    def __post_init__(self) -> None:
        """Raises ValueError or TypeError for what a file does not say so."""
        texts = isinstance(self.method, str) and isinstance(self.report, str)
        tables = isinstance(self.settings, Mapping) and isinstance(self.versions, Mapping)
        named = list(self.sources) == list(self.dials) and len(self.sources) > 0 and "." not in "".join(self.sources)
        named = named and _ROUTING not in self.sources
        if not (texts and tables and named and all(map(math.isfinite, self.dials.values()))):
            raise ValueError("expected dials of its LoRAs, a method, settings, versions and a report")

    @property
    def format(self) -> str:
        if self.method in (ROUTED, FUSED):
            return FORMAT_ROUTED if self.method == ROUTED else FORMAT_FUSED
        plain = all(lora.clip_strength is None for lora in self.sources.values())
        return FORMAT if plain and tuple(self.sources) == CONCEPTS else FORMAT_OF_ANY

    def as_table(self) -> dict[str, Any]:
        """What `_from_table` makes the same of."""
        loras = {concept: lora.as_table() for concept, lora in self.sources.items()}
        named: dict[str, Any] = {"loras": loras, "dials": dict(self.dials)}
        if self.format == FORMAT:
            named = {**loras, "dials": list(self.dials.values())}
        rest = {"method": self.method, "settings": dict(self.settings), "versions": dict(self.versions)}
        return {**named, **rest, "report": self.report, "format": self.format}


def _from_table(table: dict[str, Any]) -> SavedZip:
    """Raises ValueError, TypeError or LookupError for what is no such table."""
    if table.pop("format") == FORMAT:
        loras, dials = {c: table.pop(c) for c in CONCEPTS}, dict(zip(CONCEPTS, table.pop("dials"), strict=False))
    else:
        loras, dials = table.pop("loras"), table.pop("dials")
    return SavedZip(
        {concept: SavedLoRA(**lora) for concept, lora in loras.items()},
        {concept: float(dial) for concept, dial in dials.items()},
        **table,
    )


def write(
    path: str | os.PathLike[str],
    coefficients: Coefficients,
    about: SavedZip,
    metadata: Mapping[str, str] | None = None,
    routing: Routing | None = None,
) -> Path:
    """Write a file atomically: float32 vectors `<concept>.<layer>`, matrices `routing.<layer>`. metadata: more of it.

    Returns where it is, and raises OSError, as `atomic_write` does.
    """
    by_concept = coefficients.by_concept
    tensors = {f"{concept}.{name}": m.float() for concept, of in by_concept.items() for name, m in of.items()}
    tensors |= {f"{_ROUTING}.{name}": matrix.float() for name, matrix in (routing or {}).items()}
    return write_tensors(path, tensors, {**(metadata or {}), _KEY: json.dumps(about.as_table())})


def read_about(path: str | os.PathLike[str]) -> SavedZip:
    """What a file says of itself, from its header alone. Raises LoRAFileError as `read` does, but for numbers."""
    with opened(path) as file:
        return _about(file)


def read(path: str | os.PathLike[str]) -> tuple[Coefficients, Routing, SavedZip]:
    """Coefficients, matrices of a routed or fused merge (none of others), and what the file says of itself.

    Raises LoRAFileError for a file that is cut off, no file of this pack, or of a format that it does not know.
    """
    with opened(path) as file:
        return read_opened(file)


def read_opened(file: OpenFile) -> tuple[Coefficients, Routing, SavedZip]:
    """As `read`, of a file that is open: its metadata are those of the same file then, whatever replaces it."""
    about = _about(file)
    vectors: dict[str, dict[str, torch.Tensor]] = {concept: {} for concept in about.sources}
    matrices: dict[str, torch.Tensor] = {}
    for key, m in file.tensors():
        owner, _, name = key.partition(".")
        if not bool(torch.isfinite(m).all()):
            raise _unusable(file, key)
        (matrices if owner == _ROUTING else vectors[owner])[name] = m
    if about.settings.get(ROUTED_LAYERS, len(matrices)) != len(matrices):
        raise LoRAFileError(f"'{file.name}' lacks matrices; zip the LoRAs again and save it anew")
    return Coefficients(vectors), matrices, about


def _unusable(file: OpenFile, key: str) -> LoRAFileError:
    return LoRAFileError(
        f"'{file.name}' holds no usable coefficients at '{shown(key)}'; zip the pair again and save it anew"
    )


def _about(file: OpenFile) -> SavedZip:
    if _KEY not in file.metadata:
        raise LoRAFileError(f"'{file.name}' is no zipped pair: choose a file that Save Zipped LoRA wrote")
    try:
        table = json.loads(file.metadata[_KEY])
        if table["format"] not in FORMATS:
            raise LoRAFileError(
                f"'{file.name}' has format '{shown(str(table['format']))}', this version reads "
                f"{', '.join(repr(known) for known in FORMATS)}; update the pack"
            )
        about = _from_table(table)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        if isinstance(error, LoRAFileError):
            raise
        raise LoRAFileError(f"'{file.name}' has broken metadata; zip the pair again and save it anew") from error
    for key, place in file.places.items():
        owner = key.partition(".")[0]
        square = len(place.shape) == 2 and place.shape[0] == place.shape[1]
        downs = about.method == FUSED and len(place.shape) == 3
        matrix = owner == _ROUTING and ((about.method == ROUTED and square) or downs)
        vector = owner in about.sources and len(place.shape) == 1
        if not (matrix or vector) or place.dtype != torch.float32:
            raise _unusable(file, key)
    return about


def check_fits(name: str, coefficients: Coefficients, loras: LoRASet) -> None:
    """Raises LoRAFileError where coefficients are not those of a set, naming the first layer that differs."""
    for concept, expected in Coefficients.ones(loras).by_concept.items():
        given = coefficients[concept]
        for layer in [*expected, *given]:
            here, there = (side[layer].numel() if layer in side else 0 for side in (given, expected))
            if here != there:
                raise LoRAFileError(
                    f"'{name}' was zipped for another model: it has {here} {concept} coefficients for layer "
                    f"'{shown(layer)}', the LoRA has {there} columns there on this model; connect the model that it "
                    "was zipped on"
                )
