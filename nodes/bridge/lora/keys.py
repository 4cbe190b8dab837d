"""How LoRA files call the weights of one model: the host's own map, and the diffusers and peft names that it skips."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import comfy.lora
import comfy.utils
from torch import Tensor

from ....ziplora_core import formats
from ..network.bare import bare

Names = dict[str, str | tuple]


def unet_keys(model) -> tuple[Names, Names]:
    """Layer name in a LoRA file -> weight of this model (`diffusion_model.….weight`, or a slice of one).

    model: the host's BaseModel. (The host's own map, every other diffusers name under every peft prefix).
    """
    hosts, more = comfy.lora.model_lora_keys_unet(bare(model), {}), Names()
    for key, target in comfy.utils.unet_to_diffusers(model.model_config.unet_config).items():
        if key.endswith(".weight"):
            for prefix in formats.DIFFUSERS_PREFIXES:
                name = f"{prefix}{key.removesuffix('.weight')}"
                if name not in hosts:
                    more[name] = f"diffusion_model.{target}"
    return hosts, more


def doubled(tensors: Mapping[str, Tensor], hosts: Names, more: Names) -> list[tuple[str, str]]:
    """Layers whose update a file has under several names: (one that is passed over, the one that counts).

    It counts what the host's loader takes: the last of its own names; where it knows none of them, the last of ours.
    """
    present = {formats.layer_name(key) for key in tensors if not key.endswith(formats.BESIDE_AN_UPDATE)}
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
    table = comfy.utils.unet_to_diffusers(model.model_config.unet_config)
    names = {f"diffusion_model.{v}": k.removesuffix(".weight") for k, v in table.items() if k.endswith(".weight")}
    return FileNames(type(model.model_config).__name__, names)
