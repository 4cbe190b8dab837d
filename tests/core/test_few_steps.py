"""Names of distilled models and LoRAs, as their makers have published them, and of others that look like them."""

from __future__ import annotations

import pytest

from ziplora_core import few_steps

SDXL, Z_IMAGE, FLUX2, SD3 = ("SDXL", "BASE"), ("ZImage", "Lumina2", "BASE"), ("Flux2", "Flux", "BASE"), ("SD3", "BASE")


@pytest.mark.parametrize(
    ("name", "families", "steps"),
    [
        ("sdxl_lightning_4step.safetensors", SDXL, 4),
        ("sdxl_lightning_8step_unet.safetensors", SDXL, 8),
        ("sdxl_lightning_1step_x0.safetensors", SDXL, 1),
        ("juggernautXL_juggXILightningByRD.safetensors", SDXL, 4),
        ("sd_xl_turbo_1.0_fp16.safetensors", SDXL, 4),
        ("DreamShaperXL_Turbo_v2.safetensors", SDXL, 4),
        ("photonLCM_v10.safetensors", ("SD15", "BASE"), 8),
        ("sd3.5_large_turbo.safetensors", SD3, 4),
        ("z_image_turbo_bf16.safetensors", Z_IMAGE, 8),
        ("someMix_zitV3.safetensors", Z_IMAGE, 8),
        ("ernie-image-turbo.safetensors", ("ErnieImage", "BASE"), 8),
        ("flux1-schnell-fp8.safetensors", ("Flux", "BASE"), 4),
        ("flux-2-klein-4b-fp8.safetensors", FLUX2, 4),
        ("Hyper-SDXL-1step-Unet-Comfyui.fp16.safetensors", SDXL, 1),
        ("hidream_i1_fast_fp8.safetensors", ("HiDream", "BASE"), 16),
        ("Qwen-Image-Lightning-8steps-V1.0", ("QwenImage", "BASE"), 8),
        ("chroma-unlocked-v47-flash.safetensors", ("Chroma", "BASE"), 8),
        ("z_image_bf16.safetensors", Z_IMAGE, 0),
        ("flux-2-klein-base-4b-fp8.safetensors", FLUX2, 0),
        ("base of flux-2-klein-9b", FLUX2, 0),
        ("flux2_dev_fp8mixed.safetensors", FLUX2, 0),
        ("Chroma1-HD made from FLUX.1-schnell", ("Chroma", "BASE"), 0),
        ("flux-dev-de-distill.safetensors", ("FluxSchnell", "Flux", "BASE"), 0),
        ("OpenFLUX.1-schnell.safetensors", ("FluxSchnell", "Flux", "BASE"), 0),
        ("hyperRealism_v30.safetensors", SDXL, 0),
        ("sd_xl_base_1.0.safetensors", SDXL, 0),
        ("NoobAI-XL-Vpred-v1.0.safetensors", SDXL, 0),
        ("myModel_30000steps.safetensors", SDXL, 0),
    ],
)
def test_models(name, families, steps):
    assert few_steps.of_model(name, families) == steps


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("sdxl_lightning_4step_lora.safetensors", 4),
        ("Qwen-Image-2512-Lightning-4steps-V1.0-fp32.safetensors", 4),
        ("Hyper-SDXL-8steps-lora.safetensors", 8),
        ("lcm-lora-sdxl.safetensors", 8),
        ("LCM_LoRA_Weights_SD15.safetensors", 8),
        ("FLUX.1-Turbo-Alpha.safetensors", 8),
        ("Flux_2-Turbo-LoRA_comfyui.safetensors", 8),
        ("dmd2_sdxl_4step_lora_fp16.safetensors", 4),
        ("wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors", 4),
        ("lightning_style_xl.safetensors", 0),
        ("porsche_911_turbo.safetensors", 0),
        ("pixelart_z_image_turbo.safetensors", 0),
        ("my_dog_turbo_3000steps.safetensors", 0),
        ("flash_photography.safetensors", 0),
    ],
)
def test_loras(name, steps):
    assert few_steps.of_lora(name) == steps
