"""How LoRA files call the weights of one model: the host's own map, and the diffusers and peft names that it skips."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import comfy.lora
from torch import Tensor

from ....ziplora_core import formats
from ..network.bare import bare
from . import diffusers_names

Names = dict[str, str | tuple]


def unet_keys(model) -> tuple[Names, Names]:
    """Layer name in a LoRA file -> weight of this model (`diffusion_model.….weight`, or a slice of one).

    model: the host's BaseModel. (The host's own map, right where its table is not; every name that it lacks: diffusers'
    and the model's own, under every prefix of peft and the trainers).
    """
    hosts, more = comfy.lora.model_lora_keys_unet(bare(model), {}), Names()
    config = model.model_config.unet_config
    unet = {k.removesuffix(".weight"): t for k, t in diffusers_names.of_unet(config).items() if k.endswith(".weight")}
    modules: Names = {name: f"diffusion_model.{target}" for name, target in unet.items()}
    if not diffusers_names.is_even(config):
        hosts |= {form: target for name, target in modules.items() for form in diffusers_names.host_forms(name)}
    prefixes = formats.DIFFUSERS_PREFIXES
    if not modules:
        modules, prefixes = diffusers_names.of_transformer(config, hosts), formats.TRANSFORMER_PREFIXES
        for name, target in modules.items():
            more |= {f"{prefix}{name.replace('.', '_')}": target for prefix in formats.JOINED_PREFIXES}
    for name, target in modules.items():
        more |= {f"{prefix}{name}": target for prefix in prefixes}
    return hosts, {name: target for name, target in more.items() if name not in hosts}


def updated(tensors: Mapping[str, Tensor]) -> set[str]:
    """The layers that a LoRA file has an update of, by its names."""
    return {formats.layer_name(key) for key in tensors if not key.endswith(formats.BESIDE_AN_UPDATE)}


def doubled(tensors: Mapping[str, Tensor], hosts: Names, more: Names) -> list[tuple[str, str]]:
    """Layers whose update a file has under several names: (one that is passed over, the one that counts).

    It counts what the host's loader takes: the last of its own names; where it knows none of them, the last of ours.
    """
    present = updated(tensors)
    names_of: dict[str | tuple, list[str]] = {}
    for names in (more, hosts):
        for name, target in names.items():
            if name in present:
                names_of.setdefault(target, []).append(name)
    return [(name, several[-1]) for several in names_of.values() for name in several[:-1]]


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
    table = diffusers_names.of_unet(model.model_config.unet_config)
    names = {f"diffusion_model.{v}": k.removesuffix(".weight") for k, v in table.items() if k.endswith(".weight")}
    return FileNames(type(model.model_config).__name__, names)
