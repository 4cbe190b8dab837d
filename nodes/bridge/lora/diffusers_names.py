"""How diffusers calls a model's weights: the host's own tables, corrected, and the table that it lacks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import comfy.utils

Targets = dict[str, str | tuple]


def of_unet(config: Mapping[str, Any]) -> dict[str, str]:
    """diffusers' name of a U-Net's weight or bias -> the host's, both without a prefix; empty for other networks.

    The host counts the blocks before a level as if every level had as many residual blocks as this one.
    """
    table = comfy.utils.unet_to_diffusers(config)
    if is_even(config):
        return table
    down = list(config["num_res_blocks"])
    shifts = {"down": _shifts(down), "up": _shifts(down[::-1])}
    return {name: _moved(name, target, shifts) for name, target in table.items()}


def is_even(config: Mapping[str, Any]) -> bool:
    """Whether all levels of a U-Net have as many residual blocks, as those of every published one."""
    return len(set(config.get("num_res_blocks", ()))) <= 1


def _shifts(blocks: Sequence[int]) -> list[int]:
    """Blocks before each level, less what the host takes for them."""
    return [sum(n + 1 for n in blocks[:level]) - (own + 1) * level for level, own in enumerate(blocks)]


def _moved(name: str, target: str, shifts: Mapping[str, Sequence[int]]) -> str:
    level = re.match(r"(down|up)_blocks\.(\d+)\.", name)
    if level is None:
        return target
    blocks, number, rest = target.split(".", 2)
    return f"{blocks}.{int(number) + shifts[level[1]][int(level[2])]}.{rest}"


def host_forms(name: str) -> list[str]:
    """The names that the host's map makes of a U-Net's module in diffusers' names."""
    joined, processor = name.replace(".", "_"), re.sub(r"\.to_out\.0$", ".to_out", name)
    processor = processor.replace(".to_", ".processor.to_")
    return [f"lora_unet_{joined}", f"lycoris_{joined}", processor, f"unet.{processor}"]


def of_transformer(config: Mapping[str, Any], hosts: Targets) -> Targets:
    """Module name, the model's own or diffusers' -> weight of the model, or a part of one; for networks without U.

    hosts: the host's map, which has these names under some prefix or other.
    """
    modules = Targets()
    for prefix in ("diffusion_model.", "transformer."):
        for name, target in hosts.items():
            if name.startswith(prefix) and (isinstance(target, tuple) or target.endswith(".weight")):
                modules[name.removeprefix(prefix)] = target
    if config.get("image_model") == "lumina2" and not config.get("z_image_modulation"):
        modules |= _lumina(config)
    return modules


def _lumina(config: Mapping[str, Any]) -> Targets:
    """Lumina 2 as diffusers has it: no table of the host's is of it, only of Z-Image, its younger sister."""
    head = config["dim"] // config["n_heads"]
    query, key = config["dim"], head * (config.get("n_kv_heads") or config["n_heads"])
    table = {
        "time_caption_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_caption_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_caption_embed.caption_embedder.1": "cap_embedder.1",
        "norm_out.linear_1": "final_layer.adaLN_modulation.1",
        "norm_out.linear_2": "final_layer.linear",
    }
    parts = Targets()
    refiners = config.get("n_refiner_layers", 2)
    for kind, count in (("layers", config["n_layers"]), ("noise_refiner", refiners), ("context_refiner", refiners)):
        for block in (f"{kind}.{number}" for number in range(count)):
            table[f"{block}.attn.to_out.0"] = f"{block}.attention.out"
            if kind != "context_refiner":
                table[f"{block}.norm1.linear"] = f"{block}.adaLN_modulation.1"
            for number in (1, 2, 3):
                table[f"{block}.feed_forward.linear_{number}"] = f"{block}.feed_forward.w{number}"
            fused = f"diffusion_model.{block}.attention.qkv.weight"
            for name, start, length in (("q", 0, query), ("k", query, key), ("v", query + key, key)):
                parts[f"{block}.attn.to_{name}"] = (fused, (0, start, length))
    return {**{name: f"diffusion_model.{target}.weight" for name, target in table.items()}, **parts}
