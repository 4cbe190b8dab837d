"""Models of the host's and their twins of diffusers', with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import tiny
import torch
from families import FAMILIES, POOLED, TEXT
from torch import Tensor, nn


@dataclass(frozen=True)
class Twins:
    """A model of the host's and its twin of diffusers', with the same weights.

    targets: the twin's weights -> the host's, or (its weight, (axis, start, length), what turns rows).
    part: what diffusers' pipelines call such a model.
    """

    patcher: Any
    twin: nn.Module
    targets: dict[str, str | tuple]
    part: str
    saver: Callable[..., None]

    def placed(self, deltas: dict[str, Tensor]) -> dict[str, Tensor]:
        """Differences of the twin's weights as the host's weights have them: by key, in float64."""
        state, found = self.patcher.model.state_dict(), {}
        for name, delta in deltas.items():
            target = self.targets[name]
            key, place, turned = (target, None, None) if isinstance(target, str) else (*target, None)[:3]
            whole = found.setdefault(key, torch.zeros(state[key].shape, dtype=torch.float64))
            (whole if place is None else whole.narrow(*place)).copy_(delta if turned is None else turned(delta))
        return found


def twins_of(patcher, twin: nn.Module, targets: dict[str, str | tuple], part: str, saver: Callable[..., None]) -> Twins:
    """Gives the twin's random weights to the host's model, so that what a table maps wrong would show."""
    state = patcher.model.state_dict()
    own = twin.state_dict()
    found = {
        name: target
        for name, target in targets.items()
        if name in own and name.endswith(".weight") and own[name].ndim > 1
    }
    with torch.inference_mode():
        for name, target in found.items():
            key, place, turned = (target, None, None) if isinstance(target, str) else (*target, None)[:3]
            part_of = state[key] if place is None else state[key].narrow(*place)
            assert part_of.shape == own[name].shape, (name, key)
            part_of.copy_(own[name] if turned is None else turned(own[name]))
    return Twins(patcher, twin, found, part, saver)


def sdxl() -> Twins:
    import comfy.utils
    from diffusers import UNet2DConditionModel
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin

    torch.manual_seed(1)
    twin = UNet2DConditionModel(
        block_out_channels=(32, 64, 64),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=1,
        attention_head_dim=(2, 4, 4),
        cross_attention_dim=96,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    patcher = tiny.tiny_patcher()
    table = comfy.utils.unet_to_diffusers(patcher.model.model_config.unet_config)
    targets: dict[str, str | tuple] = {name: f"diffusion_model.{target}" for name, target in table.items()}
    return twins_of(patcher, twin, targets, "unet", StableDiffusionXLLoraLoaderMixin.save_lora_weights)


def _family(name: str, **numbers: Any) -> tuple[Any, dict[str, Any]]:
    """(Patcher of a family of `families.FAMILIES`, with some numbers of its own, and all its numbers)."""
    family = FAMILIES[name]
    patcher = replace(family, unet={**family.unet, **numbers}).patcher()
    return patcher, patcher.model.model_config.unet_config


def _prefixed(table: dict[str, Any]) -> dict[str, Any]:
    return {name: f"diffusion_model.{target}" for name, target in table.items()}


def flux() -> Twins:
    import comfy.utils
    from diffusers import FluxTransformer2DModel
    from diffusers.loaders import FluxLoraLoaderMixin

    twin = FluxTransformer2DModel(
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        pooled_projection_dim=POOLED,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    patcher, config = _family("Flux")
    table = comfy.utils.flux_to_diffusers(config, "diffusion_model.")
    return twins_of(patcher, twin, table, "transformer", FluxLoraLoaderMixin.save_lora_weights)


def sd3() -> Twins:
    import comfy.utils
    from diffusers import SD3Transformer2DModel
    from diffusers.loaders import SD3LoraLoaderMixin

    twin = SD3Transformer2DModel(
        sample_size=8,
        num_layers=2,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        caption_projection_dim=128,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=8,
    )
    patcher, config = _family("SD 3")
    table = comfy.utils.mmdit_to_diffusers(config, "diffusion_model.")
    return twins_of(patcher, twin, table, "transformer", SD3LoraLoaderMixin.save_lora_weights)


def qwen() -> Twins:
    from diffusers import QwenImageTransformer2DModel
    from diffusers.loaders import QwenImageLoraLoaderMixin

    twin = QwenImageTransformer2DModel(
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        axes_dims_rope=(8, 12, 12),
    )
    patcher, _ = _family("Qwen-Image")
    table = _prefixed({name: name for name in twin.state_dict()})
    return twins_of(patcher, twin, table, "transformer", QwenImageLoraLoaderMixin.save_lora_weights)


def z_image() -> Twins:
    import comfy.utils
    from diffusers import ZImageTransformer2DModel
    from diffusers.loaders import ZImageLoraLoaderMixin

    twin = ZImageTransformer2DModel(
        dim=96, n_layers=2, n_refiner_layers=1, n_heads=6, n_kv_heads=6, cap_feat_dim=TEXT, axes_dims=[4, 6, 6]
    )
    patcher, config = _family(
        "Lumina 2", dim=96, n_heads=6, n_kv_heads=6, z_image_modulation=True, ffn_dim_multiplier=8 / 3
    )
    table = comfy.utils.z_image_to_diffusers(config, "diffusion_model.")
    table = {name: target for name, target in table.items() if "t_embedder" not in name}  # diffusers' has one size
    return twins_of(patcher, twin, table, "transformer", ZImageLoraLoaderMixin.save_lora_weights)


def lumina() -> Twins:
    """The host has no table of it: what diffusers' own converter makes of numbers that name their rows tells."""
    from diffusers import Lumina2Transformer2DModel
    from diffusers.loaders import Lumina2LoraLoaderMixin
    from diffusers.loaders.single_file_utils import convert_lumina2_to_diffusers

    twin = Lumina2Transformer2DModel(
        hidden_size=96,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=6,
        num_kv_heads=2,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(300, 512, 512),
        cap_feat_dim=TEXT,
    )
    patcher, _ = _family("Lumina 2", dim=96, n_heads=6)
    named, rows = {}, {}
    for key, weight in patcher.model.diffusion_model.state_dict().items():
        times = 24 if "qkv" in key else 1  # the converter splits (96 + 32 + 32) * 24 rows
        named[key] = torch.arange(len(rows), len(rows) + len(weight)).repeat_interleave(times)
        rows |= {number: (key, row) for row, number in enumerate(named[key].unique().tolist())}
    table = {}
    for name, numbers in convert_lumina2_to_diffusers(named).items():
        (key, first), (_, last) = (rows[int(n)] for n in (numbers[0], numbers[-1]))
        table[name] = (f"diffusion_model.{key}", (0, first, last - first + 1))
    return twins_of(patcher, twin, table, "transformer", Lumina2LoraLoaderMixin.save_lora_weights)
