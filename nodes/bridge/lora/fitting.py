"""LoRA files of any format to a set that fits a model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import comfy.lora
import comfy.utils
import torch
from torch import Tensor

from ....ziplora_core import formats, other_kinds
from ....ziplora_core.files import LoRAFileError, all_finite, shown
from ....ziplora_core.lora_set import Factors, LoRASet
from . import base_models, dora, keys, matrices, own_adapters, refusals, spellings
from .adapters import (
    all_used,
    fits,
    is_low_rank,
    is_plain,
    kind_of,
    plainer,
    precision,
    reshapes,
    scale_of,
    turns_nothing,
)
from .base_weights import base_weight, form
from .loras import LoRASource, LoRASources, text_encoder_alone


@dataclass(frozen=True)
class FittedSet:
    """LoRAs on the layers of one model.

    passthrough: concept -> host patches that are no matrix (bias and norm differences): they are not zipped
    and follow their LoRA's strength. notes: what a user should know about the files. names: how LoRA files call
    this model's weights. own: the concepts whose files the host's loader reads not all of, or unlike who wrote them.
    """

    loras: LoRASet
    passthrough: dict[str, dict[str, Any]]
    notes: list[str]
    names: keys.FileNames
    own: frozenset[str] = frozenset()


@dataclass
class Fitting:
    """One file on its way onto the layers of a model."""

    source: LoRASource
    model: Any
    factors: dict[str, Factors] = field(default_factory=dict)
    passthrough: dict[str, Any] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)  # a note on tensors that fit no layer
    absent: list[str] = field(default_factory=list)  # what a file changes and the model has not
    doubled: list[tuple[str, str]] = field(default_factory=list)  # names passed over for others of the same layer
    dense: dict[str, list[str]] = field(default_factory=dict)  # kind of update -> layers kept as ΔW itself
    hosts: frozenset[str | tuple] = frozenset()  # targets whose update the host's loader reads
    own: bool = False  # whether the host's loader reads not all of the file: what it computes is no measure then
    trained: bool = False  # whether DoRA scales for rows count as trained even where the host reads them
    as_host: list[str] = field(default_factory=list)  # layers whose DoRA the host computes unlike who trained it
    as_trained: list[str] = field(default_factory=list)  # layers whose DoRA scale the host leaves out, or unlike them
    singular: int = 0  # layers with singular values, AdaLoRA's
    nothing: list[str] = field(default_factory=list)  # layers whose update is zero as it must be
    magnitudes: dict[str | tuple, Tensor] = field(default_factory=dict)  # of peft's DoRA, one number for each row
    eyes: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict)

    def add(self, target: str | tuple, patch: Any) -> None:
        """A patch of the host on a weight, or on a slice (axis, start, length) of a fused one."""
        magnitude = self.magnitudes.get(target)
        key, place, turned = (target, None, None) if isinstance(target, str) else (*target, None)[:3]
        patch = plainer(patch)
        weight = parameter(self.model, key)
        if weight is None:
            self.absent.append(key)
            return
        part = form(weight, place)
        if reshapes(patch):
            raise LoRAFileError(
                f"'{self.source.title}' changes the shape of layer '{key}'; a zipped pair cannot: use another file"
            )
        if not (is_plain(patch) and part.ndim > 1 and magnitude is None) and not fits(patch, part.shape):
            raise refusals.other_model(self.source, self.model, key, kind_of(patch), part.shape)
        if part.ndim < 2:
            self.passthrough[key] = patch
            return
        scale, ours = dora.row_scale(patch, part.shape), target not in self.hosts
        if magnitude is None and scale is not None and (ours or self.trained):
            magnitude = scale
        elif scale is not None:
            self.as_host.append(key)
        if magnitude is not None and not ours:
            self.as_trained.append(key)
        factors = None
        if is_low_rank(patch):
            factors = matrices.reshaped(self.source, key, matrices.low_rank(self.source, key, patch), part.shape)
        if magnitude is None and factors is not None:
            factors = factors if turned is None else replace(factors, up=turned(factors.up))
            factors = factors if place is None else matrices.widened(factors, weight.shape, *place)
        else:
            factors = self._dense(key, patch, place, weight, turned, magnitude, ours)
            if factors is None:
                self.nothing.append(key)
                return
        self.factors[key] = factors if key not in self.factors else matrices.side_by_side(self.factors[key], factors)

    def _dense(
        self,
        key: str,
        patch: Any,
        place: tuple[int, int, int] | None,
        weight: Tensor,
        turned: Callable[[Tensor], Tensor] | None,
        magnitude: Tensor | None,
        ours: bool,
    ) -> Factors | None:
        """What the host makes of the base weight with any other kind of update, minus the weight; None for nothing.

        ΔW itself stands for `down`, with a unit matrix as `up`: columns scale as in any LoRA. Of a slice too, zeros
        beside it: slices of one weight then share a `down`, and all weights of so many rows the matrix.
        weight: the whole one. turned: what the host does to rows of an update whose weight it keeps in another order
        than the file. ours: whether the host's loader does not read it. Raises LoRAFileError, MemoryError.
        """
        part = form(weight, place)
        kind = "DoRA" if magnitude is not None else kind_of(patch)
        before = base_weight(self.model, key)
        kept = precision(patch)
        if scale_of(patch) is not None and not ours:
            kept = torch.float32  # what overflows in the host's loader is to be refused, not normalized away
        before = before if place is None else before.narrow(*place)
        before = before.to("cpu").to(kept, copy=True)  # Apple's GPUs have no float64
        # The host's OFT at half the strength is not half of it: where ours alone counts, it is.
        strength, scale = (1.0, self.source.strength) if ours or magnitude is not None else (self.source.strength, 1.0)
        try:
            with refusals.logged() as said:
                if magnitude is None:
                    patched = [(strength, patch, 1.0, None, turned)]
                    after = comfy.lora.calculate_weight(patched, before.clone(), key, kept)
                    delta = after - before if after.shape == before.shape else None
                else:
                    delta = dora.update(patch, magnitude, before, key, turned)
            if any(map(refusals.is_of_memory, said)):
                raise refusals.no_memory(self.source, key, kind, part.shape)
        except (RuntimeError, IndexError) as error:
            if refusals.is_of_memory(str(error)):
                raise refusals.no_memory(self.source, key, kind, part.shape) from error
            raise refusals.other_model(self.source, self.model, key, kind, part.shape) from error
        if delta is not None and not delta.any() and turns_nothing(patch):
            return None
        if delta is None or (strength and not delta.any() and all_used(patch)):
            raise refusals.other_model(
                self.source, self.model, key, kind, part.shape
            )  # the host only logs that it does not fit
        delta = delta.float()
        if not all_finite(delta):
            raise refusals.broken(self.source, key, "its update holds NaN or infinite numbers")
        dtype = part.dtype if part.dtype in (torch.float16, torch.bfloat16) else torch.float32
        self.dense.setdefault(kind, []).append(key)
        delta = delta.to(dtype)
        if place is not None:
            whole = delta.new_zeros(weight.shape)
            whole.narrow(*place).copy_(delta)
            delta = whole
        size = (weight.shape[0], dtype)
        if size not in self.eyes:
            self.eyes[size] = torch.eye(*size[:1], dtype=dtype)
        return Factors(self.eyes[size], delta, scale)

    def notes(self) -> list[str]:
        lines = []
        if self.doubled:
            over, used = self.doubled[0]
            lines.append(
                f"'{self.source.title}' has {len(self.doubled)} layers twice, under different names; only one "
                f"counts, as in ComfyUI's own LoRA loader: e.g. '{shown(used)}', not '{shown(over)}'"
            )
        if self.as_host:
            lines.append(
                f"{len(self.as_host)} layers of '{self.source.title}' have a DoRA scale for each row: as ComfyUI's own "
                "loader computes it, by the norm of the weight alone, and not as LyCORIS or OneTrainer trained it, so "
                "it draws as with Load LoRA"
            )
        if self.as_trained:
            lines.append(
                f"{len(self.as_trained)} layers of '{self.source.title}' have a DoRA scale for each row and count as "
                "they were trained; ComfyUI's own loader reads these layers too, but leaves the scale out, or divides "
                "by the norm of the weight alone: Load LoRA draws another picture"
            )
        if self.singular:
            lines.append(
                f"'{self.source.title}' is AdaLoRA: {self.singular} layers count with their singular values, which "
                "ComfyUI's own loader leaves out where it knows a layer"
            )
        for kind, layers in self.dense.items():
            held = {id(m): m.nbytes for k in layers for m in (self.factors[k].up, self.factors[k].down)}
            lines.append(
                f"{len(layers)} layers of '{self.source.title}' are {kind}, not of low rank: their updates are kept "
                f"whole, {sum(held.values()) / 1e6:.0f} MB, and more while optimising"
            )
        return lines


def parameter(model, key: str) -> Tensor | None:
    """A weight or bias of a model; None where it has none of this name, as a layer without bias."""
    try:
        value = comfy.utils.get_attr(model, key)
    except AttributeError:
        return None
    return value if isinstance(value, Tensor) else None


def fit_one(source: LoRASource, model) -> Fitting:
    """One file on the layers of a model. Raises LoRAFileError where it fits no layer, or another model's layers."""
    singular = len(other_kinds.present(source.tensors, other_kinds.ADALORA))
    source, renamed = spellings.as_host_reads(source)
    hosts, more = keys.unet_keys(model)
    updated = keys.updated(source.tensors)
    more = {name: target for name, target in more.items() if name in updated}
    found, read = _patches(source, hosts, more)
    found |= own_adapters.patches(
        source, model, {**more, **hosts}, partial(parameter, model), partial(base_weight, model)
    )
    read -= {hosts[name] for name in renamed if name in hosts}
    fitting = Fitting(source, model, hosts=frozenset(read), own=found.keys() != read, trained=_is_fragment(found, read))
    fitting.singular = singular
    for name, target in [*more.items(), *hosts.items()]:
        magnitude = spellings.magnitude(source.tensors, name) if name in updated else None
        if magnitude is not None:
            fitting.magnitudes[target] = magnitude
    with torch.no_grad():
        for target, patch in found.items():
            fitting.add(target, patch)
    fitting.unused = _unused(source, model, {**hosts, **more}, fitting)
    fitting.doubled = keys.doubled(source.tensors, hosts, more)
    return fitting


def _patches(
    source: LoRASource, hosts: keys.Names, more: keys.Names
) -> tuple[dict[str | tuple, Any], set[str | tuple]]:
    """(The patches of a file as the host's loader has it, those of them that this loader makes)."""
    patches, others = (comfy.lora.load_lora(source.tensors, names, log_missing=False) for names in (hosts, more))
    return {**others, **patches}, set(patches)


def _is_fragment(patches: Mapping[str | tuple, Any], read: set[str | tuple]) -> bool:
    """Whether the host's loader skips so many of a file's DoRA layers that nobody has judged it by what is left.

    Of OneTrainer's it skips all attention, 4 of 10 layers and more; of files in other names some odd layer.
    """
    scaled = [target for target, patch in patches.items() if scale_of(patch) is not None]
    return sum(target not in read for target in scaled) > len(scaled) / 4


def patches(source: LoRASource, model) -> dict[str | tuple, Any]:
    """A file as the host's patches of a model, by weight or slice of one, as its own loader makes them, and of layers
    too whose names that loader skips. model: the host's BaseModel."""
    return _patches(spellings.as_host_reads(source)[0], *keys.unet_keys(model))[0]


def _unused(source: LoRASource, model, names: dict, fitting: Fitting) -> list[str]:
    unused = [k for k in source.tensors if not formats.is_elsewhere(k) and formats.layer_name(k) not in names]
    if source.tensors and formats.is_text_encoder_alone(source.tensors):
        raise text_encoder_alone(source.title)
    if not fitting.factors:
        raise refusals.nothing_fits(source, model, unused, fitting.nothing)
    unused += fitting.absent
    if not unused:
        return []
    kind = formats.unread_kind(unused)
    example = shown(unused[0]) if kind is None else shown(kind[1])
    which = "" if kind is None else f" ({kind[0]}, which is not read)"
    return [f"{len(unused)} tensors of '{source.title}' fit no layer and are not used, e.g. '{example}'{which}"]


_fitted: weakref.WeakKeyDictionary[LoRASources, tuple[weakref.ref, FittedSet]] = weakref.WeakKeyDictionary()


def fit(sources: LoRASources, model) -> FittedSet:
    """Put all files on the layers of a model. Moves and loads nothing; the same files and model are fitted once.

    model: the host's BaseModel. Raises LoRAFileError where a file fits no layer, or another model's layers.
    """
    known = _fitted.get(sources)
    if known is None or known[0]() is not model:
        known = _fitted[sources] = (weakref.ref(model), _fit(sources, model))
    return known[1]


def _fit(sources: LoRASources, model) -> FittedSet:
    notes = [*sources.warnings, *base_models.notes(sources, model)]
    notes += [note for source in sources.by_concept.values() for note in source.notes]
    fitted = {}
    for concept, source in sources.by_concept.items():
        fitted[concept] = fit_one(source, model)
        notes += [*fitted[concept].unused, *fitted[concept].notes()]
    order = dict.fromkeys(key for fitting in fitted.values() for key in fitting.factors)
    layers = {
        key: {c: fitting.factors[key] for c, fitting in fitted.items() if key in fitting.factors} for key in order
    }
    passthrough = {concept: fitting.passthrough for concept, fitting in fitted.items()}
    own = frozenset(concept for concept, fitting in fitted.items() if fitting.own or fitting.magnitudes)
    return FittedSet(LoRASet(tuple(fitted), layers), passthrough, notes, keys.file_names(model), own)
