"""Prompts and latents that a user has connected: refused where they cannot be this model's."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ....ziplora_core.files import all_finite

OTHER_CLIP = "connect a text encode node with this checkpoint's own clip"  # what to do
_UNSUPPORTED = ("area", "mask", "control", "gligen", "hooks")


def check_prompts(name: str, given: Any) -> None:
    """Raises ValueError for a value that the API let through in the place of a conditioning, of whatever prompts."""
    if not isinstance(given, list) or not all(map(_is_entry, given)):
        raise ValueError(f"{name} is no conditioning; connect a text encode node to it")


def check_conditioning(name: str, conditioning: list) -> None:
    """Raises ValueError unless a conditioning is one plain prompt: areas, masks and ControlNets have no teacher."""
    if not isinstance(conditioning, list) or not all(map(_is_prompt, conditioning)):
        raise ValueError(f"{name} is no conditioning; connect a text encode node to it")
    if len(conditioning) != 1:
        raise ValueError(
            f"{name} holds {len(conditioning)} prompts; expected one: connect a single text encode node to it"
        )
    unsupported = [key for key in _UNSUPPORTED if conditioning[0][1].get(key) is not None]
    if unsupported:
        raise ValueError(f"{name} carries {unsupported[0]}; expected a plain prompt: connect a text encode node to it")
    context, options = conditioning[0]
    tensors = [part for part in (context, options.get("pooled_output")) if part is not None]
    ranges = [value for value in options.values() if isinstance(value, float)]
    if not (all(map(_is_usable, tensors)) and all(map(math.isfinite, ranges))):
        raise ValueError(f"{name} holds no usable numbers; check the nodes that made it")


def _is_usable(numbers: Tensor) -> bool:
    """Of a kind that has arithmetic, and finite."""
    known = numbers.is_floating_point() and numbers.element_size() > 1
    return known and numbers.numel() > 0 and all_finite(numbers)


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[1], dict)


def _is_prompt(entry: Any) -> bool:
    """As the host keeps one: [context (1, tokens, width), options]."""
    if not _is_entry(entry):
        return False
    context, pooled = entry[0], entry[1].get("pooled_output")
    return isinstance(context, Tensor) and context.ndim == 3 and (pooled is None or isinstance(pooled, Tensor))


_WIDTHS = ("context_dim", "context_in_dim", "cap_feat_dim", "joint_attention_dim")  # in the host's configurations


def check_width(name: str, conditioning: list, model) -> None:
    """Raises ValueError for a prompt of another model's text encoder. model: ModelPatcher.

    For when the model has failed: other packs teach models prompts of other widths.
    """
    config, width = model.model.model_config.unet_config, conditioning[0][0].shape[-1]
    expected = [config[key] for key in _WIDTHS if isinstance(config.get(key), int)]
    if expected and width not in expected:
        raise ValueError(
            f"{name} is {width} wide, this model's prompts are {expected[0]}: it comes from another model's text "
            f"encoder; {OTHER_CLIP}"
        )


_WITH_SOUND = ("ACEAudio", "LTXAV")  # latent formats of the host's: of sound alone, and of sound beside a video


def check_model(model) -> None:
    """Raises ValueError where latents are no pictures: of sound, of shapes in space. model: ModelPatcher."""
    form = model.get_model_object("latent_format")
    if getattr(form, "latent_dimensions", 2) < 2 or type(form).__name__ in _WITH_SOUND:
        raise ValueError(
            f"this model ({type(model.model).__name__}) makes sound or shapes, or sound with its pictures; connect one "
            "that draws pictures or videos alone: LoRAs are zipped and trained on those"
        )


def read_latents(name: str, given: Any, model) -> Tensor:
    """The samples of a LATENT, (N, C, *space). Raises ValueError where they cannot be this model's."""
    samples = given.get("samples") if isinstance(given, dict) else None
    if not isinstance(samples, Tensor):
        raise ValueError(f"{name} is no latent; connect VAE Encode to it")
    check_latents(name, samples, model)
    return samples


def check_latents(name: str, latents: Tensor, model) -> None:
    """Raises ValueError where latents cannot be this model's. latents: (N, C, *space). model: ModelPatcher."""
    form = model.get_model_object("latent_format")
    channels, most = form.latent_channels, max(4, 2 + getattr(form, "latent_dimensions", 3))
    if latents.is_nested or not 4 <= latents.ndim <= most or latents.shape[1] != channels:
        raise ValueError(
            f"{name} has shape {tuple(latents.shape)}; this model's latents have {channels} channels: "
            "connect VAE Encode with this checkpoint's own VAE"
        )
    if not (latents.numel() and latents.is_floating_point()):
        raise ValueError(f"{name} is empty or not floating point; connect VAE Encode with this checkpoint's own VAE")
    if not all_finite(latents):
        raise ValueError(f"{name} holds NaN or infinite numbers; check the picture and the VAE that encoded it")
