"""Full-size SDXL from the host's own classes with random weights, random LoRAs and prompts. Host imports inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

SDXL_UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "context_dim": 2048,
    "adm_in_channels": 2816,
    "num_classes": "sequential",
    "num_heads": -1,
    "num_head_channels": 64,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
    "use_checkpoint": False,
    "legacy": False,
}


def sdxl_model(dtype: torch.dtype, compute: torch.dtype | None = None, device: str = "cpu", **changes: Any) -> Any:
    """The host's SDXL BaseModel with weights in `dtype`, cast to `compute` for use where that is given.

    changes: other numbers for the U-Net. On "meta" it takes no memory.
    """
    import comfy.supported_models

    config = comfy.supported_models.SDXL({**SDXL_UNET, **changes})
    config.set_inference_dtype(dtype, compute)
    return config.get_model({}, device=device)


def _fill(parameter: torch.Tensor, fill: Callable[..., object], *args: float) -> None:
    """Fill in place; types that have no random numbers of their own (float8) take a cast copy."""
    if parameter.element_size() > 1:
        fill(parameter.data, *args)
    else:
        wide = torch.empty(parameter.shape)
        fill(wide, *args)
        parameter.data.copy_(wide)


def sdxl_patcher(dtype: torch.dtype, compute: torch.dtype | None = None, **changes: Any) -> Any:
    """A ModelPatcher over SDXL with random weights that keep activations of order one."""
    return random_patcher(sdxl_model(dtype, compute, **changes))


def random_patcher(model: Any) -> Any:
    """A ModelPatcher over any of the host's models, filled with random weights that keep activations of order one."""
    import comfy.model_management
    import comfy.model_patcher

    for module in model.diffusion_model.modules():
        weight = getattr(module, "weight", None)
        if weight is None:
            continue
        if weight.ndim > 1:
            bound = (3.0 / weight[0].numel()) ** 0.5
            _fill(weight, lambda t, bound=bound: t.uniform_(-bound, bound))
        else:
            _fill(weight, torch.Tensor.fill_, 1.0)  # norms
        if getattr(module, "bias", None) is not None:
            _fill(module.bias, torch.Tensor.zero_)
    load = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(model, load, torch.device("cpu"))


def attention_lora(model: Any, rank: int, seed: int, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """A random LoRA on every attention q/k/v/out of an SDXL U-Net, in kohya names, alpha = rank."""
    g = torch.Generator().manual_seed(seed)
    lora = {}
    for name, weight in model.state_dict().items():
        if ".attn" in name and name.endswith(".weight"):
            out, columns = weight.shape
            key = "lora_unet_" + name.removeprefix("diffusion_model.").removesuffix(".weight").replace(".", "_")
            lora[f"{key}.lora_up.weight"] = (torch.randn(out, rank, generator=g) * 0.1 / rank**0.5).to(dtype)
            lora[f"{key}.lora_down.weight"] = (torch.randn(rank, columns, generator=g) / columns**0.5).to(dtype)
            lora[f"{key}.alpha"] = torch.tensor(float(rank))
    return lora


def random_prompt(seed: int, tokens: int = 77, width: int = 2048, pooled: int = 1280) -> list[list[Any]]:
    """A CONDITIONING with random numbers."""
    g = torch.Generator().manual_seed(seed)
    context = torch.randn(1, tokens, width, generator=g)
    return [[context, {"pooled_output": torch.randn(1, pooled, generator=g)}]]


def random_latents(side: int, seed: int, count: int = 1) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"samples": torch.randn(count, 4, side, side, generator=g)}
