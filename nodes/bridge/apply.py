"""A zipped pair on a model: the host's own patches, so that everything else of the host keeps working."""

from __future__ import annotations

import logging
from collections.abc import Callable

import comfy.lora
import torch
from comfy.weight_adapter import LoRAAdapter
from torch import Tensor

from ...ziplora_core import formats
from ...ziplora_core.lora_set import Layer
from ...ziplora_core.merge import one_lora
from .lora import captured, fitting, loader_patches, text_encoders
from .lora.adapters import fits, reshapes
from .lora.loras import STRENGTH, LoRASource, LoRASources
from .lora.zipped import ZippedLoRA
from .network.bare import bare
from .progress.bar import tell


class ZippedAdapter(LoRAAdapter):
    """One layer of a merge as the host's LoRA of the sum of its ranks, computed whenever the host reads it.

    weights: a function that computes them, or the weights, as the host copies an adapter that it moves to a device.
    layer, sources: whose merge it is; None for such a copy.
    """

    def __init__(
        self,
        loaded_keys: set[str],
        weights: Callable[[], tuple] | tuple,
        layer: Layer | None = None,
        sources: LoRASources | None = None,
    ):
        self.loaded_keys = loaded_keys
        self._weights = weights
        self.layer, self.sources = layer, sources

    @property
    def weights(self) -> tuple:
        return self._weights() if callable(self._weights) else self._weights


def _adapter(layer: Layer, coefficients: dict[str, Tensor], sources: LoRASources) -> ZippedAdapter:
    @torch.no_grad()
    def merged() -> tuple:
        return (*one_lora(layer, coefficients), None, None, None, None)

    return ZippedAdapter(set(), merged, layer, sources)


def is_on(model, zipped: ZippedLoRA) -> bool:
    """Whether a model carries this zipped pair already, with whatever dials. model: ModelPatcher."""
    layers = zipped.fitted.loras.layers
    adapters = ((key, entry[1]) for key, entries in model.patches.items() for entry in entries)
    return any(
        isinstance(a, ZippedAdapter) and a.layer is not None and a.layer is layers.get(key) for key, a in adapters
    )


def _patch(patcher, patches: dict, strength: float, names: str, made: str = "zipped"):
    """made: how it came to be another model's."""
    applied = set(patcher.add_patches(patches, strength))
    missing = [k for k in patches if k not in applied]
    if missing:
        own = "the model that it was optimised with, or one of the same family" if made == "zipped" else "its own model"
        raise ValueError(
            f"{names} was {made} for another model: {len(missing)} of its {len(patches)} layers are not in this one, "
            f"e.g. '{missing[0]}'; connect {own}"
        )


def _text_encoder(clip, source: LoRASource, strength: float) -> None:
    names = text_encoders.names(source, clip.cond_stage_model)
    patches = comfy.lora.load_lora(source.tensors, names, log_missing=False)
    unknown = sum(layer not in names for layer in formats.text_encoder_layers(source.tensors))
    if unknown:
        logging.warning("ZipLoRA: %d text-encoder layers of '%s' are not in this clip.", unknown, source.title)
    good = {key: patch for key, patch in patches.items() if _fits(clip.cond_stage_model, key, patch)}
    if len(good) < len(patches):
        dropped = len(patches) - len(good)
        logging.warning("ZipLoRA: %d text-encoder parts of '%s' do not fit and are left out.", dropped, source.title)
    scales = text_encoders.unread_scales(source)
    if scales is not None:
        logging.warning("ZipLoRA: %s.", scales)
    clip.add_patches(good, strength)


def with_text_encoder(clip, source: LoRASource, strength: float):
    """A clone of a CLIP with one LoRA's text-encoder part on it, as Load LoRA puts it there."""
    clip = clip.clone()
    _text_encoder(clip, source, strength)
    return clip


def _fits(text_encoder, key: str, patch) -> bool:
    weight = fitting.parameter(text_encoder, key)
    return weight is not None and not reshapes(patch) and fits(patch, weight.shape)


def _tell_left_out(given: ZippedLoRA | LoRASources) -> None:
    missing = text_encoders.left_out(given)
    if missing is not None:
        logging.warning("ZipLoRA: %s.", missing)
        tell(missing)


@torch.no_grad()
def stack(model, clip, sources: LoRASources, strength: float):
    """(model, clip) clones with LoRAs on them one after another, as LoRA loaders in a row put them there; what came in
    is not changed.

    Also what the host's loader does not read; only for that, updates are computed here. clip may be None. Raises
    LoRAFileError where a file is another model's.
    """
    bare(model.model)
    alone = loader_patches.alone(sources, model.model)
    if clip is None:
        _tell_left_out(sources)
    model, clip = model.clone(), None if clip is None else clip.clone()
    for concept, source in ((concept, of.times(strength)) for concept, of in sources.by_concept.items()):
        if source.strength:
            _patch(model, alone[concept], source.strength, f"'{source.title}'", "made")
        if clip is not None and source.of_clip:
            _text_encoder(clip, source, source.of_clip)
    return model, clip


def apply_once(model, clip, zipped: ZippedLoRA | LoRASources, strength: float):
    """As `apply`, but raises ValueError also where LoRA loaders have put on what a zip brings. A pair that nothing has
    zipped is one more loader itself."""
    if isinstance(zipped, ZippedLoRA):
        captured.refuse_twice(model, clip, zipped.sources)
    return apply(model, clip, zipped, strength)


@torch.no_grad()
def apply(model, clip, zipped: ZippedLoRA | LoRASources, strength: float):
    """(model, clip) clones with the zipped pair on them; what came in is not changed. A pair that nothing has zipped
    is stacked.

    The set becomes one LoRA per layer, mostly of the sum of the ranks (the identity of `merge.one_lora`). Text-encoder
    parts are merged directly, as the paper leaves them frozen; bias and norm differences follow their LoRA.
    clip may be None. Raises ValueError where the zipped pair does not belong on this model.
    """
    STRENGTH.check("strength", strength)
    if strength == 0:
        return model, clip
    if isinstance(zipped, LoRASources):
        return stack(model, clip, zipped, strength)
    names = zipped.sources.names()
    bare(model.model)  # the host takes a patch for what it finds under its name
    model = model.clone()
    patches = {
        name: _adapter(layer, zipped.coefficients.of_layer(name), zipped.sources)
        for name, layer in zipped.fitted.loras.layers.items()
    }
    _patch(model, patches, strength, names)
    for concept in zipped.sources.by_concept:
        _patch(model, zipped.fitted.passthrough[concept], strength * zipped.strength(concept), names)
    if clip is None:
        _tell_left_out(zipped)
    else:
        clip = clip.clone()
        for concept, source in zipped.sources.by_concept.items():
            _text_encoder(clip, source, strength * zipped.clip_strength(concept))
    return model, clip
