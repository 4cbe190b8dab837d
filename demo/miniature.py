"""The miniature SDXL outside the server: the host's own classes, built for training and for quick sampling.

Needs a ComfyUI tree: call `use_comfyui(path)` first. Conditioning is the host's: context = the second-to-last
layers of both text encoders beside each other, vector = pooled text beside SDXL's six size embeddings, noise
schedule = SDXL's, prediction = v (the checkpoint says so with the key `v_pred`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import autoencoder
from .autoencoder import SDXL_SCALE, Autoencoder
from .openclip import openclip
from .world.atlas import SIZE

LATENT = SIZE // 8
STEPS, CFG = 20, 1.5  # it is judged by pictures that are drawn so
UNET_PREFIX = "model.diffusion_model."
CONTEXT, POOLED = 48 + 80, 80
UNET: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "num_res_blocks": [1, 1, 1],
    "channel_mult": [1, 2, 2],
    "transformer_depth": [0, 1, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [0, 0, 1, 1, 1, 1],
    "context_dim": CONTEXT,
    "num_head_channels": 32,
    "adm_in_channels": POOLED + 6 * 256,
    "num_classes": "sequential",
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "legacy": False,
}
FIRST_STAGE = "first_stage_model."  # the autoencoder's keys in a checkpoint


def half_is_fast(device: str) -> bool:
    """Whether bfloat16 saves time there: a processor without instructions for it takes some fifty times as long."""
    if device != "cpu":
        return True
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def use_comfyui(path: str | None = None) -> None:
    """Puts a ComfyUI tree (argument, else COMFYUI_PATH) on sys.path, on the CPU unless CUDA is there.

    Raises FileNotFoundError where no tree is found.
    """
    tree = path or os.environ.get("COMFYUI_PATH", "")
    if not os.path.isfile(os.path.join(tree, "comfy", "supported_models.py")):
        raise FileNotFoundError(f"no ComfyUI tree at '{tree}': give --comfyui PATH or set COMFYUI_PATH")
    if tree not in sys.path:
        sys.path.insert(0, tree)
    import comfy.options

    comfy.options.args_parsing = False
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()


def _init(module: nn.Module) -> None:
    """The host builds layers without values; give them PyTorch's usual ones, and zeros at residual ends."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.Linear.reset_parameters(layer)
        elif isinstance(layer, nn.Conv2d):
            nn.Conv2d.reset_parameters(layer)
        elif isinstance(layer, nn.GroupNorm | nn.LayerNorm):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Embedding):
            nn.init.normal_(layer.weight, std=0.5)


class Miniature(nn.Module):
    """UNet and text encoders (the host's classes) and the narrow autoencoder."""

    sigmas: Tensor
    unet: Any  # the host's classes carry no types
    clip: Any

    def __init__(self, first_stage: dict[str, Tensor] | None = None) -> None:
        """first_stage: a trained autoencoder's weights; untrained without."""
        super().__init__()
        import comfy.ops
        from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

        from .host_extension import text

        operations = comfy.ops.disable_weight_init
        self.unet = UNetModel(**UNET, dtype=torch.float32, device="cpu", operations=operations)
        self.clip = text.MiniatureClipModel(dtype=torch.float32, model_options={"custom_operations": operations})
        self.vae = Autoencoder() if first_stage is None else autoencoder.load(first_stage)
        self.tokenizer = text.MiniatureTokenizer()
        _init(self.unet)
        _init(self.clip)
        with torch.no_grad():
            self.unet.out[2].weight.zero_()
            self.unet.out[2].bias.zero_()
            for name, weight in self.unet.named_parameters():
                if name.endswith(("out_layers.3.weight", "proj_out.weight")):
                    weight.mul_(0.3)
            for encoder in (self.clip.clip_l, self.clip.clip_g):
                encoder.transformer.text_model.embeddings.position_embedding.weight.mul_(0.5)
        self.register_buffer("sigmas", sdxl_sigmas(), persistent=False)
        self.requires_grad_(True)

    def trained_parameters(self) -> list[Tensor]:
        """UNet and text encoders, without what no output depends on."""
        return [
            p
            for n, p in [*self.unet.named_parameters(), *self.clip.named_parameters()]
            if not n.endswith("logit_scale") and n != "clip_l.transformer.text_projection.weight"
        ]

    @property
    def device(self) -> torch.device:
        return self.sigmas.device

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """B x 16 token numbers (prompts longer than one section are cut)."""
        rows = [[t for t, _ in self.tokenizer.clip_l.tokenize_with_weights(p)[0]] for p in prompts]
        return torch.tensor(rows, device=self.device)

    def encode_tokens(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(context B x 16 x 128, pooled B x 80), as the host computes them but differentiable."""
        left, _ = _text(self.clip.clip_l.transformer, tokens)
        right, pooled = _text(self.clip.clip_g.transformer, tokens)
        return torch.cat([left, right], dim=-1), pooled

    def vector(self, pooled: Tensor) -> Tensor:
        """The vector condition: pooled text and six size embeddings."""
        return torch.cat([pooled, self._sizes(pooled.device).expand(pooled.shape[0], -1)], dim=1)

    def _sizes(self, device: torch.device) -> Tensor:
        from comfy.ldm.modules.diffusionmodules.util import timestep_embedding

        values = torch.tensor([SIZE, SIZE, 0, 0, SIZE, SIZE], dtype=torch.float32, device=device)
        return timestep_embedding(values, 256).flatten().unsqueeze(0)

    def conditions(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(context, vector) of prompts, without gradient."""
        with torch.no_grad():
            context, pooled = self.encode_tokens(self.tokens(prompts))
            return context, self.vector(pooled)

    def predict(self, x: Tensor, steps: Tensor, context: Tensor, vector: Tensor) -> Tensor:
        """The raw prediction (v). x: B4hw noisy latents with variance about one; steps: B in 0..999."""
        return self.unet(x, timesteps=steps, context=context, y=vector, transformer_options=_options())

    def diffusion_loss(self, latents: Tensor, context: Tensor, vector: Tensor, steps: Tensor | None = None) -> Tensor:
        """Per-sample mean squared error of v at random steps. latents: B4hw, unit variance."""
        count = latents.shape[0]
        if steps is None:
            steps = stratified_steps(count, latents.device)
        noise = torch.randn_like(latents)
        alpha, sigma = self.alpha_sigma(steps)
        noisy = alpha * latents + sigma * noise
        target = alpha * noise - sigma * latents
        out = self.predict(noisy, steps, context, vector)
        return (out.float() - target).square().flatten(1).mean(1)

    def alpha_sigma(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise scale (B111) at the given steps; squares add up to one."""
        sigmas = self.sigmas[steps.long()].view(-1, 1, 1, 1)
        alpha = (1 + sigmas**2).rsqrt()
        return alpha, sigmas * alpha

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        seed: int,
        steps: int = STEPS,
        cfg: float = CFG,
        negative: str = "",
    ) -> Tensor:
        """B4hw latents: Euler with the host's 'normal' spacing and classifier-free guidance."""
        context, vector = self.conditions(prompts)
        empty_context, empty_vector = self.conditions([negative])
        count = len(prompts)
        context = torch.cat([context, empty_context.expand(count, -1, -1)])
        vector = torch.cat([vector, empty_vector.expand(count, -1)])
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(count, 4, LATENT, LATENT, generator=generator).to(self.device)
        times = torch.linspace(999, 0, steps).round().long().to(self.device)
        sigmas = torch.cat([self.sigmas[times], self.sigmas.new_zeros(1)])
        x = noise * (1 + sigmas[0] ** 2).sqrt()
        for i, time in enumerate(times):
            sigma = sigmas[i]
            scaled = x / (1 + sigma**2).sqrt()
            v = self.predict(torch.cat([scaled, scaled]), time.expand(2 * count), context, vector).float()
            with_text, without = v.chunk(2)
            v = without + cfg * (with_text - without)
            clean = x / (1 + sigma**2) - v * sigma / (1 + sigma**2).sqrt()
            x = x + (x - clean) / sigma * (sigmas[i + 1] - sigma)
        return x

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> Tensor:
        """B3HW in 0..1."""
        return torch.cat([self.vae.decode(part) for part in latents.split(8)]).float().clamp(0, 1)


def generate(model: Miniature, prompts: Sequence[str], seed: int, steps: int = STEPS, cfg: float = CFG) -> Tensor:
    """B3HW pictures in 0..1 on the CPU."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=half_is_fast(model.device.type)):
        latents = model.sample(prompts, seed, steps, cfg)
    return model.pictures(latents).cpu()


def stratified_steps(count: int, device: torch.device) -> Tensor:
    """Training steps 0..999, one from each of `count` equal parts: uniform, with less variance."""
    return ((torch.arange(count, device=device) + torch.rand(count, device=device)) / count * 1000).long()


def sdxl_sigmas() -> Tensor:
    """The host's 1000 noise levels for SDXL."""
    import comfy.model_sampling

    return comfy.model_sampling.ModelSamplingDiscrete().sigmas.clone()


def _plain_attention(func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **options: Any) -> Tensor:
    """Overrides the host's attention by two matrix products: on such short sequences the fastest on a CPU."""
    size = q.shape[-1] // heads
    q, k, v = (t.unflatten(-1, (heads, size)).transpose(1, 2) for t in (q, k, v))
    weights = ((q * size**-0.5) @ k.transpose(-1, -2)).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(-2)


def _options() -> dict[str, Any]:
    return {"optimized_attention_override": _plain_attention}


def _text(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The host's CLIP text model out of place: (output of the second-to-last layer, projected pooled)."""
    text = model.text_model
    x = text.embeddings.token_embedding(tokens) + text.embeddings.position_embedding.weight
    length = tokens.shape[1]
    mask = torch.full((length, length), float("-inf"), device=tokens.device).triu(1)
    layers = text.encoder.layers
    hidden = x
    for number, layer in enumerate(layers):
        x = x + layer.self_attn(layer.layer_norm1(x), mask, _text_attention)
        x = x + layer.mlp(layer.layer_norm2(x))
        if number == len(layers) - 2:
            hidden = x
    ends = (tokens == text.eos_token_id).int().argmax(dim=1)
    pooled = text.final_layer_norm(x)[torch.arange(tokens.shape[0], device=tokens.device), ends]
    return hidden, model.text_projection(pooled)


def _text_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor) -> Tensor:
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype))
    return out.transpose(1, 2).flatten(-2)


# --- files -------------------------------------------------------------------------------------------------


def checkpoint(model: Miniature) -> dict[str, Tensor]:
    """The state dict of an SDXL single-file checkpoint, in half precision."""
    state: dict[str, Tensor] = {}
    for key, value in model.unet.state_dict().items():
        state[UNET_PREFIX + key] = value
    for key, value in model.clip.clip_l.transformer.state_dict().items():
        if key.startswith("text_model."):
            state[f"conditioner.embedders.0.transformer.{key}"] = value
    for key, value in openclip(model.clip.clip_g.transformer.state_dict()).items():
        state[f"conditioner.embedders.1.model.{key}"] = value
    for key, value in model.vae.state_dict().items():
        state[FIRST_STAGE + key] = value
    half = {key: value.detach().cpu().half().contiguous() for key, value in state.items()}
    half[FIRST_STAGE + "vae_scale"] = torch.tensor(SDXL_SCALE)
    half[FIRST_STAGE + "vae_shift"] = torch.tensor(0.0)
    half["v_pred"] = torch.zeros(1)
    return half


def write_safetensors(state: dict[str, Tensor], path: str, metadata: dict[str, str] | None = None) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    save_file(state, path + ".part", metadata=metadata)
    os.replace(path + ".part", path)


def load_miniature(path: str) -> Miniature:
    """Reads a checkpoint back into a trainable, float32 model.

    Raises KeyError where a weight is missing, FileNotFoundError where there is no file.
    """
    import comfy.utils

    state = {k: v.float() for k, v in load_file(path).items()}
    model = Miniature({k.removeprefix(FIRST_STAGE): v for k, v in state.items() if k.startswith(FIRST_STAGE)})
    model.unet.load_state_dict({k: state[UNET_PREFIX + k] for k in model.unet.state_dict()})
    prefixes = {
        "conditioner.embedders.0.transformer.text_model": "clip_l.transformer.text_model",
        "conditioner.embedders.1.model.": "clip_g.",
    }
    text = comfy.utils.state_dict_prefix_replace(dict(state), prefixes, filter_keys=True)
    text = comfy.utils.clip_text_transformers_convert(text, "clip_g.", "clip_g.transformer.")
    missing, _ = model.clip.load_state_dict(text, strict=False)
    left_out = [k for k in missing if "logit_scale" not in k and k != "clip_l.transformer.text_projection.weight"]
    if left_out:
        raise KeyError(f"'{path}' lacks the text weights {left_out[:3]}")
    return model
