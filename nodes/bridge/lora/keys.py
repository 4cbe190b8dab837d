"""Names of LoRA layers: what the host's loader knows, and the diffusers/peft names that it skips."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import comfy.lora
import comfy.utils
from torch import Tensor

from ..network.bare import bare

# Prefixes that diffusers and peft put before a module's diffusers name. On SDXL the host maps the
# `processor` names only, so files of the diffusers DreamBooth scripts and of B-LoRA load as nothing.
_DIFFUSERS_PREFIXES = ("", "unet.", "unet.unet.", "base_model.model.", "unet.base_model.model.")

_SUFFIX = re.compile(
    r"(?:[._]lora\.(?:up|down)\.weight|\.lora_(?:up|down|mid)\.weight|\.lora_[AB](?:\.default)?(?:\.weight)?"
    r"|\.lora_linear_layer\.(?:up|down)\.weight|\.alpha|\.dora_scale|\.reshape_weight|\.diff|\.diff_b|\.[wb]_norm"
    r"|\.set_weight|\.hada_[wt]\d(?:_[ab])?|\.lokr_[wt]\d(?:_[ab])?|\.oft_\w+|\.rescale|\.[ab][12]\.weight)$"
)
_BESIDE_AN_UPDATE = (".alpha", ".diff_b", ".b_norm", ".dora_scale", ".reshape_weight", ".rescale")
_TEXT_ENCODER = re.compile(r"^(?:lora_te|lora_prior_te|text_encoder|text_encoders|te\d?[._]|base_model\.model\.text)")


def layer_name(key: str) -> str:
    """The layer that a tensor of a LoRA file belongs to: its name without `.lora_up.weight` and the like."""
    return _SUFFIX.sub("", key)


def is_text_encoder(key: str) -> bool:
    return _TEXT_ENCODER.match(key) is not None


def is_text_encoder_alone(names: Iterable[str]) -> bool:
    """Whether a LoRA file with these tensors changes no layer of a model."""
    return all(map(is_text_encoder, names))


Names = dict[str, str | tuple]


def unet_keys(model) -> tuple[Names, Names]:
    """Layer name in a LoRA file -> weight of this model (`diffusion_model.….weight`, or a slice of one).

    model: the host's BaseModel. (The host's own map, every other diffusers name under every peft prefix).
    """
    hosts, more = comfy.lora.model_lora_keys_unet(bare(model), {}), {}
    for key, target in comfy.utils.unet_to_diffusers(model.model_config.unet_config).items():
        if key.endswith(".weight"):
            for prefix in _DIFFUSERS_PREFIXES:
                name = f"{prefix}{key.removesuffix('.weight')}"
                if name not in hosts:
                    more[name] = f"diffusion_model.{target}"
    return hosts, more


def doubled(tensors: Mapping[str, Tensor], hosts: Names, more: Names) -> list[tuple[str, str]]:
    """Layers whose update a file has under several names: (one that is passed over, the one that counts).

    It counts what the host's loader takes: the last of its own names; where it knows none of them, the last of ours.
    """
    there = {layer_name(key) for key in tensors if not key.endswith(_BESIDE_AN_UPDATE)}
    found: dict[str | tuple, list[str]] = {}
    for names in (more, hosts):
        for name, target in names.items():
            if name in there:
                found.setdefault(target, []).append(name)
    return [(name, several[-1]) for several in found.values() for name in several[:-1]]


@dataclass(frozen=True)
class FileNames:
    """How LoRA files call the weights of one model.

    family: the host's name for it. diffusers: weight of the model -> module name, where diffusers has one.
    """

    family: str
    diffusers: Mapping[str, str]

    def kohya(self, key: str) -> str:
        """`lora_unet_…` of a weight or bias: the model's own name, as SDXL's trainers write it; SD 1.5's diffusers'."""
        weight = re.sub(r"\.bias$", ".weight", key)
        name = self.diffusers.get(weight) if self.family.startswith("SD1") else None
        name = name or weight.removeprefix("diffusion_model.").removesuffix(".weight")
        return "lora_unet_" + name.replace(".", "_")


def file_names(model) -> FileNames:
    """model: the host's BaseModel."""
    table = comfy.utils.unet_to_diffusers(model.model_config.unet_config)
    found = {f"diffusion_model.{v}": k.removesuffix(".weight") for k, v in table.items() if k.endswith(".weight")}
    return FileNames(type(model.model_config).__name__, found)


_TE_PREFIXES = (  # before a text encoder's module names, and kohya's names for the same
    (re.compile(r"^(?:base_model\.model\.)?text_encoder_2\.(?:base_model\.model\.)?"), "lora_te2_"),
    (re.compile(r"^(?:base_model\.model\.)?text_encoder\.(?:base_model\.model\.)?"), "lora_te1_"),
)


def kohya_text_encoder(layer: str) -> str:
    """kohya's name of a text-encoder layer of a LoRA file; names of other forms stay as they are."""
    for pattern, prefix in _TE_PREFIXES:
        if pattern.match(layer):
            return prefix + pattern.sub("", layer).replace(".", "_")
    return layer


def text_encoder_layers(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Text-encoder layer of a LoRA file -> kohya's name of it.

    Of several names of one layer the last counts, as in the host's loader: names that it does not know come first,
    then kohya's, then diffusers'.
    """

    def place(layer: str) -> int:
        return 1 if layer.startswith("lora_te") else 2 if re.match(r"text_encoder(_2)?\.text_model\.", layer) else 0

    return {k: kohya_text_encoder(k) for k in sorted(map(layer_name, filter(is_text_encoder, tensors)), key=place)}


_FAMILIES = (  # what only one family's names hold, in this order
    ("Wan", r"blocks[._]\d+[._](?:cross_attn|self_attn)[._]"),
    ("HunyuanVideo", r"individual_token_refiner"),
    ("Qwen-Image", r"transformer_blocks[._]\d+[._](?:img_mlp|txt_mlp|img_mod)"),
    ("Flux", r"(?:double_blocks|single_blocks|single_transformer_blocks)[._]\d"),
    ("SD 3", r"joint_blocks[._]\d|transformer_blocks[._]\d+[._]ff_context"),
    ("SD 3 or Qwen-Image", r"transformer_blocks[._]\d+[._]attn[._]add_[qkv]_proj"),
    ("Lumina 2 or Z-Image", r"(?:noise_refiner|context_refiner)[._]\d|layers[._]\d+[._](?:attention|adaLN_modulation)"),
)
_CONTEXT_WIDTHS = {768: "SD 1.5", 1024: "SD 2", 1280: "SDXL refiner", 2048: "SDXL"}


def looks_like(tensors: Mapping[str, Tensor]) -> str | None:
    """Which model family a LoRA file was made for, from its names and the width of its prompts; None where unclear."""
    for family, pattern in _FAMILIES:
        if any(re.search(pattern, name) for name in tensors if not is_text_encoder(name)):
            return family
    for name, tensor in tensors.items():
        if re.search(r"attn2[._](?:processor[._])?to_k.*(?:down|lora_A)", name) and tensor.ndim >= 2:
            return _CONTEXT_WIDTHS.get(tensor.shape[1])
    return None
