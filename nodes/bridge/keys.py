"""Names of LoRA layers: what the host's loader knows, and the diffusers/peft names that it skips."""

from __future__ import annotations

import re

import comfy.lora
import comfy.utils

# Prefixes that diffusers and peft put before a module's diffusers name. On SDXL the host maps the
# `processor` names only, so files of the diffusers DreamBooth scripts and of B-LoRA load as nothing.
_DIFFUSERS_PREFIXES = ("", "unet.", "unet.unet.", "base_model.model.", "unet.base_model.model.")

_SUFFIX = re.compile(
    r"(?:[._]lora\.(?:up|down)\.weight|\.lora_(?:up|down|mid)\.weight|\.lora_[AB](?:\.default)?(?:\.weight)?"
    r"|\.lora_linear_layer\.(?:up|down)\.weight|\.alpha|\.dora_scale|\.reshape_weight|\.diff|\.diff_b|\.[wb]_norm"
    r"|\.set_weight|\.hada_[wt]\d(?:_[ab])?|\.lokr_[wt]\d(?:_[ab])?|\.oft_\w+|\.[ab][12]\.weight)$"
)
_TEXT_ENCODER = re.compile(r"^(?:lora_te|lora_prior_te|text_encoder|text_encoders|te\d?[._]|base_model\.model\.text)")


def layer_name(key: str) -> str:
    """The layer that a tensor of a LoRA file belongs to: its name without `.lora_up.weight` and the like."""
    return _SUFFIX.sub("", key)


def is_text_encoder(key: str) -> bool:
    return _TEXT_ENCODER.match(key) is not None


def unet_keys(model) -> dict[str, str | tuple]:
    """Layer name in a LoRA file -> weight of this model (`diffusion_model.….weight`, or a slice of one).

    model: the host's BaseModel. The host's own map, and every diffusers name under every peft prefix.
    """
    names = comfy.lora.model_lora_keys_unet(model, {})
    for key, target in comfy.utils.unet_to_diffusers(model.model_config.unet_config).items():
        if key.endswith(".weight"):
            for prefix in _DIFFUSERS_PREFIXES:
                names.setdefault(f"{prefix}{key.removesuffix('.weight')}", f"diffusion_model.{target}")
    return names
