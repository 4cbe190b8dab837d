"""The host's LoRA loader: what it makes of a file, and what its calls have put on a model.

It makes all patches of one file at once, and each of them keeps one and the same set: the names of that file's tensors
that it has used. So patches of one call are told from another's, whoever made it: ComfyUI's own loaders and the
loaders of other packs, which call it too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import Any

import comfy.lora
from comfy.lora_convert import convert_lora
from comfy.weight_adapter.base import WeightAdapterBase
from torch import Tensor

from ..network.bare import bare
from .loras import same_bits

Place = tuple[str, Any]  # a weight, and the slice of it (axis, start, length) or None


@dataclass
class Call:
    """What one call of the host's loader has put on a model or a text encoder."""

    names: set[str]  # of the file's tensors that it used; its identity tells the call
    entries: list[tuple[Place, tuple]] = field(default_factory=list)

    def strengths(self) -> tuple[float, ...] | None:
        """One, or several where its patches were put on again; none for nothing, and None where layers differ."""
        by_place: dict[Place, list[float]] = {}
        for place, entry in self.entries:
            by_place.setdefault(place, []).append(entry[0])
        found = {tuple(strengths) for strengths in by_place.values()} or {()}
        return found.pop() if len(found) == 1 else None


def calls_on(patches: Mapping[str, list[tuple]]) -> list[Call]:
    """In the order in which they were made, as far as layers that they share tell it."""
    calls: dict[int, Call] = {}
    before: dict[int, set[int]] = {}
    for key, entries in patches.items():
        earlier: set[int] = set()
        for entry in entries:
            names = getattr(entry[1], "loaded_keys", None)
            if isinstance(entry[1], WeightAdapterBase) and names:  # those that are made of no file have none
                calls.setdefault(id(names), Call(names)).entries.append(((key, entry[3]), entry))
                before.setdefault(id(names), set()).update(earlier - {id(names)})
                earlier.add(id(names))
    try:
        order = list(TopologicalSorter(before).static_order())
    except CycleError:  # as where a patch was put on twice
        order = list(calls)
    return [calls[call] for call in order]


class Loader:
    """The host's LoRA loader on one model and text encoder. model: the host's BaseModel, or None for the text encoder
    alone; clip: None for the model alone."""

    def __init__(self, model, clip=None) -> None:
        self.names: dict[str, Any] = {} if model is None else comfy.lora.model_lora_keys_unet(bare(model), {})
        self.keys = [set[str]() if model is None else set(model.state_dict()), set[str]()]
        if clip is not None:
            self.names = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, self.names)
            self.keys[1] = set(clip.cond_stage_model.state_dict())

    def layers(self, place: Place) -> tuple[str, ...]:
        """What files call a place."""
        return tuple(name for name, target in self.names.items() if place_of(target) == place)

    def makes(self, tensors: Mapping[str, Tensor]) -> list[dict[Place, Any]]:
        """What it makes of a file, as it stands there: [the model's patches, the text encoder's]."""
        made = comfy.lora.load_lora(convert_lora(dict(tensors)), self.names, log_missing=False)
        placed = {place_of(target): patch for target, patch in made.items()}
        return [{place: patch for place, patch in placed.items() if place[0] in keys} for keys in self.keys]


def place_of(target: str | tuple) -> Place:
    return (target, None) if isinstance(target, str) else (target[0], target[1])


def matrices(adapter: WeightAdapterBase) -> list[Tensor]:
    return [part for part in adapter.weights if isinstance(part, Tensor) and part.ndim > 1]


def same(one: Any, other: Any) -> bool:
    """Whether two patches, or parts of patches, are one to the last bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return same_bits(one, other)
    if isinstance(one, WeightAdapterBase) and isinstance(other, WeightAdapterBase):
        return one.name == other.name and same(tuple(one.weights), tuple(other.weights))
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)
