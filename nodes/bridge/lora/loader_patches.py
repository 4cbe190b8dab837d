"""LoRAs one by one as patches of the host, to be stacked: updates are computed only where its own loader makes none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from comfy.weight_adapter import LoRAAdapter

from ....ziplora_core import formats
from . import fitting, keys, refusals, spellings
from .adapters import fits, plainer, reshapes
from .base_weights import form
from .loras import LoRASource, LoRASources, text_encoder_alone

Patches = dict[str | tuple, Any]


def alone(sources: LoRASources, model) -> dict[str, Patches]:
    """Each LoRA's patches at strength 1, by concept: the host's own, or of a file that it reads not all of, its
    factors. model: the host's BaseModel, bare. Raises LoRAFileError as `fitting.fit` does."""
    every = sources.by_concept
    own = {concept: source for concept, source in every.items() if _is_read_otherwise(source, model)}
    found = {concept: _checked(source, model) for concept, source in every.items() if concept not in own}
    if own:
        fitted = fitting.fit(sources if own.keys() == every.keys() else replace(sources, by_concept=own), model)
        found |= {concept: _factors(fitted, concept, source) for concept, source in own.items()}
    return found


def _factors(fitted: fitting.FittedSet, concept: str, source: LoRASource) -> Patches:
    layers = {name: layer[concept] for name, layer in fitted.loras.layers.items() if concept in layer}
    made = Patches(fitted.passthrough[concept].items())
    if source.strength:  # or else nothing is put on
        for name, of in layers.items():
            alpha = of.scale / source.strength * of.rank
            made[name] = LoRAAdapter(set(), (of.up, of.down, alpha, None, None, None))
    return made


def _is_read_otherwise(source: LoRASource, model) -> bool:
    """Whether the host's loader reads not all of a file, or unlike who wrote it, as `FittedSet.own`. By names alone:
    nothing is computed."""
    source, renamed = spellings.as_host_reads(source)
    hosts, more = keys.unet_keys(model)
    updated = keys.updated(source.tensors)
    scaled = (spellings.magnitude(source.tensors, name) is not None for name in hosts if name in updated)
    return bool(renamed) or not updated.isdisjoint(more) or any(scaled)


def _checked(source: LoRASource, model) -> Patches:
    """The host's patches, of weights that the model has. Nothing is computed. Raises LoRAFileError where none changes a
    layer, or one does not fit."""
    found: Patches = {}
    layers = 0
    for target, patch in fitting.patches(source, model).items():
        key, place = (target, None) if isinstance(target, str) else target[:2]
        weight = fitting.parameter(model, key)
        if weight is None:
            continue
        part = form(weight, place)
        if reshapes(patch) or not fits(plainer(patch), part.shape):
            fitting.Fitting(source, model).add(target, patch)  # refuses it, but where a matrix is only kept flat
        found[target] = patch
        layers += part.ndim > 1
    if formats.is_text_encoder_alone(source.tensors):
        raise text_encoder_alone(source.title)
    if not layers:
        hosts, more = keys.unet_keys(model)
        unused = [k for k in source.tensors if formats.layer_name(k) not in hosts and formats.layer_name(k) not in more]
        raise refusals.nothing_fits(source, model, unused, [])
    return found
