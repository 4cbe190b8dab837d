"""LoRAs that loaders have put on a model: which files they are, and the model without them.

The host's loader makes all patches of one file at once, and each of them keeps one and the same set: the names of that
file's tensors that it has used. So patches of one call are told from another's, whoever made it: ComfyUI's own loaders
and the loaders of other packs, which call it too. A file with these names and numbers is the one that was loaded.
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import Any

import folder_paths
import torch
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy.weight_adapter.base import WeightAdapterBase
from torch import Tensor

from ....ziplora_core.files import LoRAFileError, opened
from . import fitting, loras, text_encoders
from .keys import unet_keys

_Place = tuple[str, Any]  # a weight, and the slice of it (axis, start, length) or None
_CHOOSE = "choose its file in subject_lora or style_lora, and take its loader away"


@dataclass(frozen=True)
class Captured:
    """A LoRA on a model: its file, and the strengths that its loaders gave it. layers: of the model."""

    name: str
    strength: float
    clip_strength: float
    layers: int

    def line(self) -> str:
        title = loras.shown(self.name, 255)
        text = f", text encoder {self.clip_strength:g}" if self.clip_strength != self.strength else ""
        return f"taken off the model: '{title}' at {self.strength:g}{text} ({self.layers} layers)"


@dataclass(frozen=True)
class Chain:
    """The LoRAs of a model, in the order of their loaders. taken: its patches and its clip's that are theirs, by id."""

    loras: list[Captured]
    taken: frozenset[int]
    others: int

    def lines(self) -> list[str]:
        """What a report says of them."""
        stay = f"{self.others} other patches stay on the model: they are no LoRA" if self.others else ""
        return [*(lora.line() for lora in self.loras), *filter(None, [stay])]

    def without(self, model, clip) -> tuple[Any, Any]:
        """(model, clip) clones without the LoRAs; what came in is not changed. model: ModelPatcher."""
        model, clip = model.clone(), clip.clone()
        for patcher in (model, clip.patcher):
            kept = {key: [e for e in entries if id(e) not in self.taken] for key, entries in patcher.patches.items()}
            patcher.patches = {key: entries for key, entries in kept.items() if entries}
            patcher.patches_uuid = uuid.uuid4()
        return model, clip


@dataclass
class _Call:
    """What one call of the host's loader has put on a model or a text encoder."""

    names: set[str]  # of the file's tensors that it used; its identity tells the call
    entries: list[tuple[_Place, tuple]] = field(default_factory=list)

    def strength(self) -> float | None:
        """None where it has several."""
        found = {entry[0] for _, entry in self.entries}
        return found.pop() if len(found) == 1 else None


def _calls(patches: Mapping[str, list[tuple]]) -> list[_Call]:
    """In the order in which they were made, as far as layers that they share tell it."""
    calls: dict[int, _Call] = {}
    before: dict[int, set[int]] = {}
    for key, entries in patches.items():
        earlier: set[int] = set()
        for entry in entries:
            names = getattr(entry[1], "loaded_keys", None)
            if isinstance(entry[1], WeightAdapterBase) and names:  # those that are made of no file have none
                calls.setdefault(id(names), _Call(names)).entries.append(((key, entry[3]), entry))
                before.setdefault(id(names), set()).update(earlier - {id(names)})
                earlier.add(id(names))
    try:
        order = list(TopologicalSorter(before).static_order())
    except CycleError:  # as where a patch was put on twice
        order = list(calls)
    return [calls[call] for call in order]


_known: weakref.WeakKeyDictionary[Any, tuple[tuple, Chain]] = weakref.WeakKeyDictionary()


def find(model, clip) -> Chain:
    """The LoRAs on a model. model: ModelPatcher; it and clip are unchanged, and nothing of them is loaded.

    Raises LoRAFileError for one that is the LoRA of no file, or that is no longer a LoRA by itself. Interrupts pass
    through.
    """
    state = (model.patches_uuid, clip.patcher.patches_uuid)
    known = _known.get(model)
    if known is None or known[0] != state:
        known = _known[model] = (state, _find(model, clip))
    return known[1]


def _find(model, clip) -> Chain:
    of_clip = {id(call.names): call for call in _calls(clip.patcher.patches)}
    found: dict[str, Captured] = {}
    taken: set[int] = set()
    for place, call in enumerate(_calls(model.patches), 1):
        source = _file_of(call, model.model)
        if source is None:
            raise LoRAFileError(
                f"LoRA {place} on the model ({len(call.entries)} layers) is that of no file in the loras folder as it "
                "is now: connect the file's own loader, or what trained it to Pair LoRAs"
            )
        beside = of_clip.get(id(call.names), _Call(call.names))
        strength = call.strength()
        clip_strength = beside.strength() if beside.entries else 0.0
        if not text_encoders.parts(source):
            clip_strength = strength
        if strength is None or clip_strength is None:
            raise LoRAFileError(
                f"'{source.title}' is on the model at several strengths, as by block weights, which cannot be zipped; "
                f"{_CHOOSE}"
            )
        _check_unmixed(model, call, source)
        taken |= {id(entry) for _, entry in [*call.entries, *beside.entries]}
        taken |= {id(entry) for entry in _differences(model, source, strength, taken)}
        earlier = found.get(source.name, Captured(source.name, 0.0, 0.0, 0))
        sums = earlier.strength + strength, earlier.clip_strength + clip_strength
        found[source.name] = Captured(source.name, *sums, len(call.entries))
    others = sum(id(entry) not in taken for entries in model.patches.values() for entry in entries)
    return Chain(list(found.values()), frozenset(taken), others)


def _check_unmixed(model, call: _Call, source: loras.LoRASource) -> None:
    """Raises LoRAFileError where a later patch scales what a LoRA has made of a weight, as nodes that merge models do:
    the model without it would be another one."""
    for (key, _), entry in call.entries:
        later = False
        for other in model.patches[key]:
            if later and other[2] != 1.0:
                raise LoRAFileError(
                    f"another model was merged in after '{source.title}' was put on (layer '{key}'); put LoRA loaders "
                    "behind the node that merges models"
                )
            later = later or other is entry


def _differences(model, source: loras.LoRASource, strength: float, taken: set[int]) -> Iterator[tuple]:
    """Patches of the same file that are no matrices, as of biases and norms: they name no file themselves."""
    for target, patch in fitting.patches(source, model.model).items():
        key = target if isinstance(target, str) else target[0]
        if isinstance(patch, tuple):
            same = (e for e in model.patches.get(key, ()) if isinstance(e[1], tuple) and e[0] == strength)
            yield from [entry for entry in same if id(entry) not in taken and _same(entry[1], patch)][:1]


def _file_of(call: _Call, model) -> loras.LoRASource | None:
    """The file in the loras folders whose LoRA a call has put on, read; the first one where there are copies.

    Of most others the header is read, and of those with the same names one matrix. model: the host's BaseModel.
    """
    is_alike = _first_matrix(call, model)
    for name in folder_paths.get_filename_list("loras"):
        throw_exception_if_processing_interrupted()
        with suppress(LoRAFileError):  # of files that cannot be read, none was loaded
            path = loras.lora_path(name)
            if is_alike(path):
                source = loras.load(name, 1.0)
                made = {_place(target): patch for target, patch in fitting.patches(source, model).items()}
                if all(_same(made.get(place), entry[1]) for place, entry in call.entries):
                    return source
    return None


def _place(target: str | tuple) -> _Place:
    return (target, None) if isinstance(target, str) else (target[0], target[1])


def _first_matrix(call: _Call, model) -> Callable[[str], bool]:
    """Whether a file, by its path, has the names that a call used, and the call's first matrix under one of them."""
    place, (_, adapter, *_) = call.entries[0]
    layers = tuple(name for name, target in unet_keys(model)[0].items() if _place(target) == place)
    matrices = [part for part in adapter.weights if isinstance(part, Tensor) and part.ndim > 1]

    def is_alike(path: str) -> bool:
        with opened(path) as file:
            if not matrices or not call.names <= file.places.keys():
                return False
            own = [name for name in call.names if name.startswith(layers)]
            found = [file.tensor(n) for n in own if tuple(file.places[n].shape) == tuple(matrices[0].shape)]
            return any(_same(tensor, matrices[0]) for tensor in found)

    return is_alike


def _same(one: Any, other: Any) -> bool:
    """Whether two patches, or parts of patches, are one to the last bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        alike = one.shape == other.shape and one.dtype == other.dtype
        return alike and torch.equal(_bits(one), _bits(other))
    if isinstance(one, WeightAdapterBase) and isinstance(other, WeightAdapterBase):
        return one.name == other.name and _same(tuple(one.weights), tuple(other.weights))
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and bool(one == other)


def _bits(tensor: Tensor) -> Tensor:
    """torch compares no float8 with itself."""
    here = tensor.detach().cpu()
    return here.contiguous().view(torch.uint8) if here.element_size() == 1 else here
