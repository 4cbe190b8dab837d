"""The miniature model as ComfyUI's own loader sees it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_base
import comfy.utils
import pytest
import torch


def test_checkpoint_loads_as_sdxl(miniature: Any) -> None:
    assert isinstance(miniature.model.model, comfy.model_base.SDXL)
    tokens = miniature.clip.tokenize("a red star in flat style")
    conditioning = miniature.clip.encode_from_tokens_scheduled(tokens)
    assert torch.isfinite(conditioning[0][0]).all()
    pixels = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(0))
    latent = miniature.vae.encode(pixels)
    assert latent.shape == (1, 4, 16, 16)
    assert miniature.vae.decode(latent).shape == pixels.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_checkpoint_loads_in_every_precision(load_miniature: Callable[..., Any], dtype: torch.dtype) -> None:
    model = load_miniature(dtype=dtype).model
    weight = comfy.utils.get_attr(model.model, "diffusion_model.input_blocks.0.0.weight")
    assert weight.dtype == dtype


def test_every_lora_key_is_known_to_the_stock_loader(miniature: Any, lora_files: dict[str, Path]) -> None:
    known = comfy.lora.model_lora_keys_unet(miniature.model.model, {})
    for name, path in lora_files.items():
        lora = comfy.utils.load_torch_file(str(path), safe_load=True)
        patches = comfy.lora.load_lora(lora, known, log_missing=False)
        loaded = {key for adapter in patches.values() for key in adapter.loaded_keys}
        assert loaded == set(lora), f"{name} has keys that the stock loader leaves out: {set(lora) - loaded}"
