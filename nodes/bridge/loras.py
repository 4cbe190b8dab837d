"""LoRA files to a pair that fits a model."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from typing import Any

import comfy.lora
import comfy.utils
import folder_paths
import torch
from comfy.weight_adapter import LoRAAdapter
from torch import Tensor

from ...ziplora_core.coefficients import Coefficients
from ...ziplora_core.files import LoRAFileError, read_lora_file
from ...ziplora_core.pair import Factors, LayerPair, LoRAPair
from . import keys

ZIPPED = "zipped"


@dataclass(frozen=True)
class LoRASource:
    """One LoRA file as read: its name in the loras folder, tensors on the CPU, and the strength it is used at.

    version: `fingerprint` of the file when it was read; None where the tensors come from elsewhere.
    """

    name: str
    tensors: dict[str, Tensor]
    strength: float
    version: tuple[str, int, int] | None = None


@dataclass(frozen=True)
class LoRASources:
    """What travels on a LORA_PAIR socket: two files, not yet fitted to a model."""

    content: LoRASource
    style: LoRASource
    warnings: tuple[str, ...] = ()

    def by_concept(self) -> dict[str, LoRASource]:
        return {"content": self.content, "style": self.style}


@dataclass(frozen=True)
class FittedPair:
    """A pair on the layers of one model.

    riders: concept -> host patches that are no matrix (bias and norm differences): they are not zipped,
    they follow their LoRA's strength. notes: what a user should know about the files. names: how LoRA files call
    this model's weights.
    """

    pair: LoRAPair
    riders: dict[str, dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    names: keys.FileNames = field(default_factory=lambda: keys.FileNames("", {}))


@dataclass(frozen=True)
class ZippedLoRA:
    """What travels on a ZIPPED_LORA socket: the pair, its coefficients, and the dials already turned.

    method, settings: how it came about, for the file that it may be saved to.
    """

    sources: LoRASources
    fitted: FittedPair
    coefficients: Coefficients
    content_strength: float = 1.0
    style_strength: float = 1.0
    report: str = ""
    method: str = ZIPPED
    settings: dict[str, Any] = field(default_factory=dict)

    def strength(self, concept: str) -> float:
        """Of what is not zipped but follows its LoRA: the file's strength times the dial."""
        dial = {"content": self.content_strength, "style": self.style_strength}[concept]
        return self.sources.by_concept()[concept].strength * dial


def lora_path(name: str) -> str:
    """Full path of a file in the host's loras folders. Raises LoRAFileError where there is none."""
    path = folder_paths.get_full_path("loras", name)
    if path is None:
        raise LoRAFileError(f"'{name}' is missing; put it into the loras folder or choose another file")
    return path


def fingerprint(name: str) -> tuple[str, int, int]:
    """Path, size and modification time: changes when the file does."""
    path = lora_path(name)
    status = os.stat(path)
    return path, status.st_size, status.st_mtime_ns


_seen_good: set[tuple[str, int, int]] = set()


def check(name: str) -> str | None:
    """One sentence on why this file cannot be used, or None. Reads a file's numbers once per version of it."""
    try:
        seen = fingerprint(name)
        if seen not in _seen_good:
            read_lora_file(seen[0])
            _seen_good.add(seen)
    except LoRAFileError as error:
        return str(error)
    return None


def load_pair(content: str, style: str, content_strength: float, style_strength: float) -> LoRASources:
    """Read both files. Raises LoRAFileError; warns where both are the same file."""
    warnings = []
    if lora_path(content) == lora_path(style):
        warnings.append(f"'{content}' is both the content and the style LoRA: there is nothing to zip apart")
        logging.warning("ZipLoRA: %s.", warnings[0])
    return LoRASources(_read(content, content_strength), _read(style, style_strength), tuple(warnings))


def _read(name: str, strength: float) -> LoRASource:
    version = fingerprint(name)
    return LoRASource(name, read_lora_file(version[0]), strength, version)


def _factors(source: LoRASource, key: str, adapter: Any, weight: Tensor) -> Factors:
    """The host's adapter of one layer as up (out, r) and down (r, in, *kernel)."""
    if not isinstance(adapter, LoRAAdapter):
        kind = getattr(adapter, "name", None) or "weight difference"
        raise LoRAFileError(
            f"'{source.name}' changes layer '{key}' with a {kind}, not with up and down matrices; "
            "this version zips plain LoRA files only: convert it to LoRA or use another file"
        )
    up, down, alpha, mid, dora_scale, reshape = adapter.weights
    if dora_scale is not None or reshape is not None:
        raise LoRAFileError(
            f"'{source.name}' carries a {'DoRA scale' if dora_scale is not None else 'reshaped weight'} at layer "
            f"'{key}'; this version zips plain LoRA files only: use a file trained without it"
        )
    if mid is not None:  # Tucker convolution: down'[p, in, kernel] = Σ_q mid[p, q, kernel] · down[q, in]
        down = torch.einsum("pq...,qi->pi...", mid.float(), down.flatten(1).float())
    up, rank = up.flatten(1), down.shape[0]
    if up.shape != (weight.shape[0], rank) or down.numel() != rank * weight[0].numel():
        raise LoRAFileError(
            f"'{source.name}' was made for another model: its layer '{key}' changes a weight of shape "
            f"({up.shape[0]}, {down.numel() // rank}), this model's is {tuple(weight.shape)}; "
            "choose a LoRA of the same model family"
        )
    scale = source.strength * (1.0 if alpha is None else alpha / rank)
    return Factors(up, down.reshape(rank, *weight.shape[1:]), scale)


def _fit_one(source: LoRASource, model, names: dict) -> tuple[dict[str, Factors], dict[str, Any], list[str]]:
    patches = comfy.lora.load_lora(source.tensors, names, log_missing=False)
    factors: dict[str, Factors] = {}
    riders: dict[str, Any] = {}
    for key, patch in patches.items():
        if isinstance(key, tuple):
            raise LoRAFileError(
                f"'{source.name}' changes a part of the fused layer '{key[0]}'; this version zips whole layers only"
            )
        weight = comfy.utils.get_attr(model, key)
        if isinstance(patch, tuple) and weight.ndim < 2:
            riders[key] = patch
        else:
            factors[key] = _factors(source, key, patch, weight)
    unused = [k for k in source.tensors if not keys.is_text_encoder(k) and keys.layer_name(k) not in names]
    if not factors:
        example = unused[0] if unused else next(iter(source.tensors), "no tensor at all")
        raise LoRAFileError(
            f"'{source.name}' has no layer that fits this model ({type(model).__name__}): found e.g. '{example}'; "
            "choose a LoRA of the same model family"
        )
    notes = []
    if unused:
        notes.append(f"{len(unused)} tensors of '{source.name}' fit no layer and are not used, e.g. '{unused[0]}'")
    return factors, riders, notes


def fit(sources: LoRASources, model) -> FittedPair:
    """Put both files on the layers of a model. Moves and loads nothing.

    model: the host's BaseModel. Raises LoRAFileError where a file fits no layer, or another model's layers.
    """
    names = keys.unet_keys(model)
    content, content_riders, content_notes = _fit_one(sources.content, model, names)
    style, style_riders, style_notes = _fit_one(sources.style, model, names)
    order = [*content, *(k for k in style if k not in content)]
    pair = LoRAPair({k: LayerPair(content.get(k), style.get(k)) for k in order})
    riders = {"content": content_riders, "style": style_riders}
    return FittedPair(pair, riders, [*sources.warnings, *content_notes, *style_notes], keys.file_names(model))
