"""Every model family that is zipped, of those that the host has."""

from __future__ import annotations

import torch
from family import POOLED, TEXT, TOKENS, Family
from more_families import MORE

from devhost import full_size

FIRST = {
    "SD 1.5": Family(
        "SD15",
        {
            **full_size.SDXL_UNET,
            "model_channels": 32,
            "num_res_blocks": [1, 1],
            "channel_mult": [1, 2],
            "transformer_depth": [1, 1],
            "transformer_depth_middle": 1,
            "transformer_depth_output": [1, 1, 1, 1],
            "context_dim": TEXT,
            "num_heads": 4,
            "num_head_channels": -1,
            "use_linear_in_transformer": False,
            "adm_in_channels": None,
            "num_classes": None,
        },
        (4, 8, 8),
        (".attn",),
        pooled=0,
        predicts="eps",
    ),
    "SD 3": Family(
        "SD3",
        {
            "in_channels": 16,
            "patch_size": 2,
            "depth": 2,
            "input_size": None,
            "adm_in_channels": POOLED,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": TEXT, "out_features": 128},
            },
            "num_patches": 64,
            "pos_embed_max_size": 8,
            "pos_embed_scaling_factor": None,
        },
        (16, 8, 8),
        (".attn.", ".mlp."),
    ),
    "Flux": Family(
        "Flux",
        {
            "image_model": "flux",
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "vec_in_dim": POOLED,
            "context_in_dim": TEXT,
            "hidden_size": 64,
            "mlp_ratio": 4.0,
            "num_heads": 2,
            "depth": 2,
            "depth_single_blocks": 2,
            "axes_dim": [8, 12, 12],
            "theta": 10000,
            "qkv_bias": True,
            "guidance_embed": True,
            "txt_ids_dims": [],
        },
        (16, 8, 8),
        ("_attn.", "linear1", "linear2"),
        params="comfy.ldm.flux.model.FluxParams",
    ),
    "Lumina 2": Family(
        "Lumina2",
        {
            "image_model": "lumina2",
            "patch_size": 2,
            "in_channels": 16,
            "dim": 64,
            "cap_feat_dim": TEXT,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 4,
            "n_kv_heads": 2,
            "qk_norm": True,
            "axes_dims": [4, 6, 6],
            "axes_lens": [300, 512, 512],
            "rope_theta": 10000.0,
        },
        (16, 8, 8),
        (".attention.", ".feed_forward."),
        {"attention_mask": torch.ones(1, TOKENS, dtype=torch.long)},
        pooled=0,
    ),
    "Qwen-Image": Family(
        "QwenImage",
        {
            "image_model": "qwen_image",
            "in_channels": 64,
            "out_channels": 16,
            "patch_size": 2,
            "num_layers": 2,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "joint_attention_dim": TEXT,
            "axes_dims_rope": [8, 12, 12],
        },
        (16, 1, 8, 8),
        (".attn.",),
        pooled=0,
    ),
}

FAMILIES = {name: family for name, family in {**FIRST, **MORE}.items() if family.is_known()}
