"""LoRAs that loaders have put on a model: which files they are, and the model without them.

A file with the names that a call of the host's loader used, and with its numbers, is the one that was loaded.
"""

from __future__ import annotations

import os
import uuid
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import folder_paths
from comfy.lora_convert import convert_lora
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy.weight_adapter.base import WeightAdapterBase

from ....ziplora_core import few_steps
from ....ziplora_core.files import LoRAFileError, OpenFile, opened, read_lora_file
from . import loras, text_encoders
from .calls import Call, Loader, Place, calls_on, matrices, same

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
    """The LoRAs of a model, in the order of their loaders. taken: its patches and its clip's that are theirs, by id.
    stays: names of those that make it draw in few steps, which are left on it."""

    loras: list[Captured]
    taken: frozenset[int]
    others: int
    stays: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """What a report says of them."""
        why = "other patches stay on the model: no LoRA file was recognized in them"
        stay = f"{self.others} {why}" if self.others else ""
        few = [f"stays on the model, which draws in few steps by it: '{loras.shown(n, 255)}'" for n in self.stays]
        return [*(lora.line() for lora in self.loras), *few, *filter(None, [stay])]

    def without(self, model, clip) -> tuple[Any, Any]:
        """(model, clip) clones without the LoRAs; what came in is not changed. model: ModelPatcher."""
        model, clip = model.clone(), clip.clone()
        for patcher in (model, clip.patcher):
            kept = {key: [e for e in entries if id(e) not in self.taken] for key, entries in patcher.patches.items()}
            patcher.patches = {key: entries for key, entries in kept.items() if entries}
            patcher.patches_uuid = uuid.uuid4()
        return model, clip


@dataclass(frozen=True)
class _Known:
    """What was found on a model. state: of its patches and its clip's. versions: of the files, by name."""

    state: tuple
    versions: Mapping[str, loras.FileVersion | None]
    chain: Chain

    def holds(self, state: tuple) -> bool:
        try:
            return state == self.state and all(loras.fingerprint(name) == v for name, v in self.versions.items())
        except LoRAFileError:
            return False


_known: weakref.WeakKeyDictionary[Any, _Known] = weakref.WeakKeyDictionary()


def find(model, clip) -> Chain:
    """The LoRAs on a model. model: ModelPatcher; it and clip are unchanged, and nothing of them is loaded.

    Raises LoRAFileError for one that is the LoRA of no file, that is not on the model whole and at one strength, or
    that its loader has read unlike this pack. Interrupts pass through.
    """
    state = (model.patches_uuid, clip.patcher.patches_uuid)
    known = _known.get(model)
    if known is None or not known.holds(state):
        known = _known[model] = _Known(state, *_find(model, clip))
    return known.chain


def _find(model, clip) -> tuple[dict[str, loras.FileVersion | None], Chain]:
    of_clip = {id(call.names): call for call in calls_on(clip.patcher.patches)}
    calls = [(call, of_clip.get(id(call.names), Call(call.names))) for call in calls_on(model.patches)]
    files = _files(calls, Loader(model.model, clip))
    found: dict[str, Captured] = {}
    taken: set[int] = set()
    fast: dict[str, list[int]] = {}
    for place, (call, beside) in enumerate(calls, 1):
        if id(call.names) not in files:
            raise LoRAFileError(
                f"LoRA {place} on the model ({len(call.entries)} layers) is that of no file in the loras folder as it "
                f"is now: {_CHOOSE}; connect what a node has trained to Pair LoRAs"
            )
        file = files[id(call.names)]
        source, (of_model, of_text) = file.source, file.made
        if few_steps.of_lora(os.path.basename(source.name)):
            fast.setdefault(source.name, []).extend(id(entry) for _, entry in call.entries)
            continue
        if source.config:
            raise LoRAFileError(
                f"'{source.title}' has its alpha in its header or in 'adapter_config.json' beside it, which the loader "
                f"does not read: it put it on the model at scale 1, and this pack would use alpha / r; {_CHOOSE}"
            )
        strengths = _take(call, of_model, model.patches, "model", source, taken)
        clip_strengths = _take(beside, of_text, clip.patcher.patches, "text encoder", source, taken, len(strengths))
        strength, clip_strength = sum(strengths), sum(clip_strengths)
        if not text_encoders.parts(source):
            clip_strength = strength
        earlier = found.get(source.name, Captured(source.name, 0.0, 0.0, 0))
        sums = earlier.strength + strength, earlier.clip_strength + clip_strength
        found[source.name] = Captured(source.name, *sums, len(call.entries))
    known = taken.union(*fast.values())
    others = sum(id(entry) not in known for entries in model.patches.values() for entry in entries)
    versions = {file.source.name: file.source.version for file in files.values()}
    return versions, Chain(list(found.values()), frozenset(taken), others, tuple(fast))


def _take(
    call: Call,
    made: Mapping[Place, Any],
    patches: Mapping[str, list[tuple]],
    where: str,
    source: loras.LoRASource,
    taken: set[int],
    most: int = 1,
) -> tuple[float, ...]:
    """A call's strengths on a model or a text encoder, none where it has put nothing there; `taken` grows by its
    patches, those included that are no matrices, as of biases and norms, which name no file themselves.

    most: of these, where nothing else tells how often they are on. Raises LoRAFileError where it is not on whole.
    """
    strengths, entries = call.strengths(), list(call.entries)
    if strengths is None:
        raise LoRAFileError(
            f"'{source.title}' is on the {where} at several strengths, as by block weights, which cannot be zipped; "
            f"{_CHOOSE}"
        )
    for place, patch in made.items():
        if isinstance(patch, tuple):
            alike = [entry for entry in patches.get(place[0], ()) if _is_of(entry, place, patch, taken)]
            strengths = strengths or tuple(entry[0] for entry in alike[:most])
            for strength in strengths:
                put = next((entry for entry in alike if entry[0] == strength), None)
                if put is not None:
                    alike.remove(put)
                    entries.append((place, put))
    there = {place for place, _ in entries}
    if there and len(there) < len(made):
        raise LoRAFileError(
            f"only {len(there)} of {len(made)} layers of '{source.title}' are on the {where}, as by block weights, "
            f"which cannot be zipped; {_CHOOSE}"
        )
    _check_unmixed(patches, entries, source)
    taken |= {id(entry) for _, entry in entries}
    return strengths


def _is_of(entry: tuple, place: Place, patch: tuple, taken: set[int]) -> bool:
    return isinstance(entry[1], tuple) and entry[3] == place[1] and id(entry) not in taken and same(entry[1], patch)


def _check_unmixed(
    patches: Mapping[str, list[tuple]], entries: Iterable[tuple[Place, tuple]], source: loras.LoRASource
) -> None:
    """Raises LoRAFileError where a later patch scales what a LoRA has made of a weight, as nodes that merge models do:
    the model without it would be another one."""
    for (key, _), entry in entries:
        later = False
        for other in patches[key]:
            if later and other[2] != 1.0:
                raise LoRAFileError(
                    f"another model was merged in after '{source.title}' was put on (layer '{key}'); put LoRA loaders "
                    "behind the node that merges models"
                )
            later = later or other is entry


@dataclass(frozen=True)
class _File:
    """made: what the host's loader makes of it on the model, and on the text encoder."""

    source: loras.LoRASource
    made: list[dict[Place, Any]]


_MOST_RECENT = 64
_recent: dict[str, None] = {}  # names of files that were found, the last one last


def _files(calls: Sequence[tuple[Call, Call]], loader: Loader) -> dict[int, _File]:
    """The files in the loras folders whose LoRAs calls have put on, read, by the identity of a call's names; of copies
    the one that was found last, or else the first.

    calls: on the model, and beside it on the text encoder. Of most other files the header is read, and of those with
    the same names one matrix; each at most once.
    """
    left = {id(call.names): (call, beside, _FirstMatrix(call, loader)) for call, beside in calls}
    found: dict[int, _File] = {}
    listed = folder_paths.get_filename_list("loras")
    for name in dict.fromkeys([*(name for name in reversed(list(_recent)) if name in set(listed)), *listed]):
        if not left:
            break
        throw_exception_if_processing_interrupted()
        with suppress(LoRAFileError, LookupError, AttributeError):  # what cannot be read, or converted, was not loaded
            path = loras.lora_path(name)
            with opened(path) as file:
                alike = [call for call, (_, _, first) in left.items() if first.is_in(file)]
            if not alike:
                continue
            source = loras.load(name, 1.0)
            as_it_stands = read_lora_file(path) if source.config else source.tensors
            made = loader.makes(as_it_stands)
            for call in alike:
                on_both = zip(left[call][:2], made, strict=True)
                if all(same(of.get(place), entry[1]) for put, of in on_both for place, entry in put.entries):
                    found[call] = _File(source, made)
                    del left[call]
                    _recent.pop(name, None)
                    _recent[name] = None
    for name in list(_recent)[:-_MOST_RECENT]:
        del _recent[name]
    return found


def names_on(model, says: Callable[[str], Any]) -> list[str]:
    """Files in the loras folders that loaders have put on a model, the last one first, of those whose name says
    something alone. says: of a file's name without its folder. A header and one matrix of each are read.

    model: ModelPatcher, unchanged. What no file is known of is left out.
    """
    calls = calls_on(model.patches)
    names = [name for name in folder_paths.get_filename_list("loras") if says(os.path.basename(name))] if calls else []
    if not names:
        return []
    loader = Loader(model.model)
    wanted = [_FirstMatrix(call, loader) for call in reversed(calls)]
    found: dict[int, str] = {}
    for name in names:
        throw_exception_if_processing_interrupted()
        with suppress(LoRAFileError, LookupError, AttributeError), opened(loras.lora_path(name)) as file:
            found |= {i: name for i, first in enumerate(wanted) if i not in found and first.is_in(file)}
    return [found[i] for i in sorted(found)]


class _FirstMatrix:
    """The names that a call used, and its first matrix under one of them."""

    def __init__(self, call: Call, loader: Loader) -> None:
        place, (_, adapter, *_) = call.entries[0]
        self._names = call.names
        self._matrix = next(iter(matrices(adapter)), None)
        layers = loader.layers(place)
        self._own = [name for name in call.names if name.startswith(layers)]

    def is_in(self, file: OpenFile) -> bool:
        if self._matrix is None:
            return False
        names = {id(place): name for name, place in file.places.items()}
        places = convert_lora(dict(file.places))  # by the names that the loader makes of a file's
        if not self._names <= places.keys():
            return False
        alike = [places[name] for name in self._own if tuple(places[name].shape) == tuple(self._matrix.shape)]
        return any(same(file.tensor(names[id(place)]), self._matrix) for place in alike if id(place) in names)


def refuse_twice(model, clip, sources: loras.LoRASources) -> None:
    """Raises ValueError where loaders have put all LoRAs of a zip on a model or its text encoder already: each would
    count twice. One of several may be meant: a little more of a subject. model: ModelPatcher; clip may be None."""
    on_clip = [] if clip is None else calls_on(clip.patcher.patches)
    _refuse_twice((calls_on(model.patches), on_clip), Loader(model.model, clip), sources)


def refuse_twice_on_clip(clip, sources: loras.LoRASources) -> None:
    """The same where a node is given the text encoders alone."""
    _refuse_twice(([], calls_on(clip.patcher.patches)), Loader(None, clip), sources)


def _refuse_twice(calls: tuple[list[Call], list[Call]], loader: Loader, sources: loras.LoRASources) -> None:
    if not any(calls):
        return
    for source in sources.by_concept.values():
        names = convert_lora(dict(source.tensors)).keys()
        put = [[call for call in of if call.names <= names] for of in calls]
        made = loader.makes(source.tensors) if any(put) else []
        if not any(_is_all_of(call, of) for of, there in zip(made, put, strict=False) for call in there):
            return
    titles = " and ".join(f"'{source.title}'" for source in sources.by_concept.values())
    raise ValueError(
        f"model or clip has {titles} on it already, by LoRA loaders, and the zip brings them too, so they would count "
        "twice; connect the model and the clip from before these loaders"
    )


def _is_all_of(call: Call, made: Mapping[Place, Any]) -> bool:
    """Whether a call has put on matrices of a file and no others, at whatever alpha."""
    for place, entry in call.entries:
        patch = made.get(place)
        if not isinstance(patch, WeightAdapterBase) or not same(matrices(patch), matrices(entry[1])):
            return False
    return True
