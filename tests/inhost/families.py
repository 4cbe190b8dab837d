"""Every model family that is zipped, tiny in every number: the host's own classes with random weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from devhost import full_size

TEXT, POOLED = 48, 32  # widths


@dataclass(frozen=True)
class Family:
    """config: the host's class. unet: its numbers. latent: shape of one. layers: in names of what LoRAs change."""

    config: str
    unet: dict[str, Any]
    latent: tuple[int, ...]
    layers: tuple[str, ...]
    options: dict[str, Tensor] = field(default_factory=dict)
    pooled: bool = True

    def model(self, dtype: torch.dtype = torch.float32):
        import comfy.supported_models
        from comfy.ldm.flux.model import FluxParams

        unet = dict(self.unet)
        if self.config == "Flux" and "txt_ids_dims" in FluxParams.__dataclass_fields__:
            unet["txt_ids_dims"] = []  # as newer hosts find it in Flux 1
        config = getattr(comfy.supported_models, self.config)(unet)
        config.set_inference_dtype(dtype, None)
        return config.get_model({}, device="cpu")

    def patcher(self):
        """A ModelPatcher as a loader leaves one: weights are inference tensors."""
        torch.manual_seed(0)
        with torch.inference_mode():
            patcher = full_size.random_patcher(self.model())
            for name, p in patcher.model.diffusion_model.named_parameters():
                if p.ndim == 1 and not name.endswith("bias"):
                    p.data.fill_(1.0)  # norms of other classes
                elif p.ndim > 1 and not name.endswith("weight"):
                    p.data.uniform_(-0.5, 0.5)  # tables and pads
            for table in patcher.model.diffusion_model.buffers():  # SD 3's is made without values
                if table.is_floating_point():
                    table.uniform_(-0.5, 0.5)
            return patcher

    def weights(self, model) -> dict[str, Tensor]:
        """What a LoRA of this family changes: weight of the model -> its tensor."""
        return {
            k: w
            for k, w in model.state_dict().items()
            if k.endswith(".weight") and w.ndim == 2 and any(part in k for part in self.layers)
        }

    def lora(self, model, rank: int, seed: int) -> dict[str, Tensor]:
        """In kohya's names, alpha twice the rank."""
        g = torch.Generator().manual_seed(seed)
        file = {}
        for key, weight in self.weights(model).items():
            out, columns = weight.shape
            name = "lora_unet_" + key.removeprefix("diffusion_model.").removesuffix(".weight").replace(".", "_")
            file[f"{name}.lora_up.weight"] = torch.randn(out, rank, generator=g) * 0.1 / rank**0.5
            file[f"{name}.lora_down.weight"] = torch.randn(rank, columns, generator=g) / columns**0.5
            file[f"{name}.alpha"] = torch.tensor(2.0 * rank)
        return file

    def prompts(self) -> dict[str, list]:
        with torch.inference_mode():
            return {c: self._prompt(seed) for seed, c in enumerate(("content", "style"))}

    def _prompt(self, seed: int) -> list:
        g = torch.Generator().manual_seed(seed)
        options = {k: v.clone() for k, v in self.options.items()}
        if self.pooled:
            options["pooled_output"] = torch.randn(1, POOLED, generator=g)
        return [[torch.randn(1, 20, TEXT, generator=g), options]]

    def latents(self) -> dict[str, dict[str, Tensor]]:
        with torch.inference_mode():
            made = {}
            for seed, c in enumerate(("content", "style")):
                g = torch.Generator().manual_seed(7 + seed)
                made[c] = {"samples": torch.randn(1, *self.latent, generator=g)}
            return made

    def sample(self, patcher) -> Tensor:
        """What the host's sampler draws: the witness that a model is what it was."""
        import comfy.sample

        with torch.inference_mode():
            empty = torch.zeros(1, *self.latent)
            noise = torch.randn(empty.shape, generator=torch.Generator().manual_seed(0))
            prompts = self.prompts()
            return comfy.sample.sample(
                patcher, noise, 3, 3.0, "euler", "simple", prompts["content"], prompts["style"], empty, seed=0,
                disable_pbar=True,
            )  # fmt: skip


FAMILIES = {
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
        pooled=False,
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
        },
        (16, 8, 8),
        ("_attn.", "linear1", "linear2"),
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
        {"attention_mask": torch.ones(1, 20, dtype=torch.long)},
        pooled=False,
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
        pooled=False,
    ),
}
