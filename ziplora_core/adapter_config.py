"""How strong a LoRA's updates are where its matrices do not say it: peft's configuration, in a header or a file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from . import formats

HEADER = "lora_adapter_metadata"  # of diffusers
FILE = "adapter_config.json"  # of peft, beside `adapter_model.safetensors`
LARGEST = 2**20  # characters of either
_LONGEST_PATTERN = 200
_MOST_PATTERNS = 100  # regular expressions in a table: each is tried on each layer
_NAME = re.compile(r"\^?[\w.-]+")  # a pattern that is a layer's name, or the whole of one
_PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")  # of a pipeline
_BEFORE = re.compile(rf"^(?:(?P<part>{'|'.join(_PARTS)})\.)?(?P<peft>(?:unet\.)?base_model\.model\.)?")
_RANKED = (  # matrix of a layer whose first size is the layer's rank
    ".lora_A.weight", ".lora_A.default.weight", ".lora_A", ".lora.down.weight", ".lora_down.weight",
    ".lora_linear_layer.down.weight", ".hada_w1_b",
)  # fmt: skip
_SCALED = (".lokr_w1", ".lokr_w1_a")  # LoKr's rank shows in no matrix where both factors are whole


@dataclass(frozen=True)
class AdapterConfig:
    """What peft keeps of an adapter: alpha and rank of all layers, and of those whose names a pattern ends."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    adalora: bool = False  # whose ranks shrink in training, with the scale of the first

    def scale(self, layer: str, rank: int | None = None) -> float:
        """By which a layer's matrices are multiplied: alpha / rank, alpha / √rank for rsLoRA (arXiv 2312.03732).

        layer: its module's name. rank: of its matrices, where they tell.
        """
        if self.adalora:
            return (self.alpha if self.alpha > 0 else self.rank) / (self.rank + 1e-5)
        alpha, size = float(self._alphas.of(layer, self.alpha)), rank or self.rank_of(layer)
        return alpha / (math.sqrt(size) if self.rslora else size)

    def rank_of(self, layer: str) -> int:
        return int(self._ranks.of(layer, self.rank))

    @cached_property
    def _ranks(self) -> _Patterns:
        return _Patterns(self.rank_pattern)

    @cached_property
    def _alphas(self) -> _Patterns:
        return _Patterns(self.alpha_pattern)


class _Patterns:
    """A table of peft's, by the endings of layers' names: those that are names are looked up, as files have hundreds,
    the rest is compiled once."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        self._values = list(table.values())
        self._names = {pattern: place for place, pattern in enumerate(table) if _NAME.fullmatch(pattern)}
        self._others = [
            (place, re.compile(rf"(?:.*\.)?(?:{pattern})$"))
            for place, pattern in enumerate(table)
            if pattern not in self._names
        ]

    def of(self, layer: str, otherwise: Any) -> Any:
        """The value of the first pattern that a layer's name ends with, after a dot or from its start, as in peft.

        A dot in a pattern that is a name stands for itself, and for any character in other patterns.
        """
        parts = layer.split(".")
        endings = [f"^{layer}", *(".".join(parts[start:]) for start in range(len(parts)))]
        none = len(self._values)
        first = min((self._names.get(ending, none) for ending in endings), default=none)
        for place, pattern in self._others:
            if place > first:
                break
            if pattern.match(layer):
                return self._values[place]
        return otherwise if first == none else self._values[first]


def _parsed(table: Any) -> AdapterConfig | None:
    """None for what is no configuration of an adapter with a rank."""
    if not isinstance(table, dict):
        return None
    alpha, adalora = table.get("lora_alpha", table.get("alpha")), table.get("peft_type") == "ADALORA"
    config = AdapterConfig(
        table.get("init_r" if adalora else "r"),  # type: ignore[arg-type]
        alpha,  # type: ignore[arg-type]
        {} if adalora else table.get("rank_pattern") or {},
        {} if adalora else table.get("alpha_pattern") or {},
        bool(table.get("use_rslora")),
        adalora,
    )
    tables = (config.rank_pattern, config.alpha_pattern)
    if not all(isinstance(patterns, dict) and _are_plain(patterns) for patterns in tables):
        return None
    ranks, alphas = [config.rank, *config.rank_pattern.values()], [config.alpha, *config.alpha_pattern.values()]
    if not all(type(r) is int and r > 0 for r in ranks):
        return None
    return config if all(type(a) in (int, float) and math.isfinite(a) for a in alphas) else None


def _are_plain(patterns: Iterable[str]) -> bool:
    """Whether the patterns that are no names are few and plain."""
    others = [pattern for pattern in patterns if len(pattern) > _LONGEST_PATTERN or not _NAME.fullmatch(pattern)]
    return len(others) <= _MOST_PATTERNS and all(map(_is_plain, others))


def _is_plain(pattern: str) -> bool:
    """Whether a pattern is a name, perhaps with a few signs of a regular expression, and none that takes for ever."""
    if len(pattern) > _LONGEST_PATTERN or len(re.findall(r"[*+?{]", pattern)) > 2 or re.search(r"\)[*+?{]", pattern):
        return False
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _table(text: str) -> dict[str, Any]:
    try:
        table = json.loads(text) if len(text) <= LARGEST else {}
    except (ValueError, RecursionError):
        return {}
    return table if isinstance(table, dict) else {}


def table_of(text: str) -> dict[str, Any]:
    """The text of peft's `adapter_config.json`; empty for what is none."""
    return _table(text)


def in_header(metadata: Mapping[str, str]) -> dict[str, AdapterConfig]:
    """Part of a pipeline ("unet", …; "" where the file is of one part) -> its configuration, of those that are right.

    metadata: of a safetensors header.
    """
    table = _table(metadata.get(HEADER, ""))
    found = {"": _parsed(table)}
    for part in _PARTS:
        start = f"{part}."
        found[part] = _parsed({k.removeprefix(start): v for k, v in table.items() if k.startswith(start)})
    return {part: config for part, config in found.items() if config is not None}


def in_file(text: str) -> dict[str, AdapterConfig]:
    """As `in_header`, of the text of peft's `adapter_config.json`."""
    config = _parsed(_table(text))
    return {} if config is None else {"": config}


def why_unusable(text: str) -> str:
    """What is wrong with the text of peft's `adapter_config.json`, of which `in_file` makes nothing."""
    table = _table(text)
    if not table:
        return "holds no table in JSON"
    without = {name: value for name, value in table.items() if name not in ("rank_pattern", "alpha_pattern")}
    return "gives no r and lora_alpha" if _parsed(without) is None else "has patterns that are not read, or too many"


def fits(tensors: Mapping[str, Tensor], configs: Mapping[str, AdapterConfig]) -> bool:
    """Whether a file's ranks are those of its configuration, as they are not of one that another LoRA left there."""
    ranks = [(*_configured(layer_name, configs), t.shape[0]) for layer_name, t in _ranked(tensors)]
    return all(config is None or config.adalora or config.rank_of(name) == rank for config, name, rank in ranks)


def _ranked(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((formats.layer_name(key), t) for key, t in tensors.items() if key.endswith(_RANKED) and t.ndim)


def _configured(layer: str, configs: Mapping[str, AdapterConfig]) -> tuple[AdapterConfig | None, str]:
    """(Configuration of a layer, the name that its patterns mean)."""
    match = _BEFORE.match(layer)
    assert match is not None  # it may be empty
    return configs.get(match["part"] or "", configs.get("")), layer[match.end() :]


def lacks_alpha(tensors: Mapping[str, Tensor], endings: tuple[str, ...] = ("",)) -> bool:
    """Whether a file is as peft's `save_pretrained` writes it: its alpha then stands beside it alone. endings: of the
    tensors that are looked at."""
    layers = {formats.layer_name(key) for key in tensors if key.endswith(endings)}
    return any(_BEFORE.match(layer)["peft"] and f"{layer}.alpha" not in tensors for layer in layers)  # type: ignore[index]


def with_alphas(
    tensors: Mapping[str, Tensor], configs: Mapping[str, AdapterConfig]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """(Tensors of a file with an alpha for each layer that a configuration speaks of and that has none, layer's name in
    the file -> its scale).

    alpha: such that alpha / rank, as every reader has it, is the layer's scale. LoKr, whose rank a reader may not know,
    has its smaller factor scaled instead, in float32. Layers that count once stay as they are and are in neither.
    Raises nothing.
    """
    found, scales = dict(tensors), dict[str, float]()
    for key, tensor in tensors.items():
        layer = formats.layer_name(key)
        config, name = _configured(layer, configs)
        if config is None or f"{layer}.alpha" in tensors or not tensor.ndim:
            continue
        rank = tensor.shape[0]
        if key.endswith(_RANKED) and rank:
            scale = config.scale(name, rank)
            if scale != 1:
                found[f"{layer}.alpha"] = torch.tensor(scale * rank, dtype=torch.float64)
        elif key.endswith(_SCALED):
            scale = config.scale(name)
            if scale != 1:
                found[key] = tensor.float() * scale
        else:
            continue
        if scale != 1:
            scales[layer] = scale
    return found, scales
