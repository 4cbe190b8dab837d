"""SDXL in every joint and tiny in every number, with random weights: the host's own class through its own patcher."""

from __future__ import annotations

import torch
from torch import Tensor

from devhost import full_size

CHANGES = {
    "model_channels": 32,
    "channel_mult": [1, 2, 2],
    "transformer_depth": [0, 0, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1],
    "context_dim": 96,
    "num_head_channels": 16,
}


def tiny_patcher(dtype: torch.dtype = torch.float32, compute: torch.dtype | None = None):
    """A ModelPatcher as the checkpoint loader leaves one: weights are inference tensors."""
    torch.manual_seed(0)
    with torch.inference_mode():
        return full_size.sdxl_patcher(dtype, compute, **CHANGES)


def prompts() -> dict[str, list]:
    with torch.inference_mode():
        return {c: full_size.random_prompt(i, width=96) for i, c in enumerate(("content", "style"))}


def latents(side: int = 8) -> dict[str, dict[str, Tensor]]:
    with torch.inference_mode():
        return {c: full_size.random_latents(side, 7 + i) for i, c in enumerate(("content", "style"))}


def of_two(content, style) -> dict:
    """By concept, of a pair."""
    return {"content": content, "style": style}


def sources(pack, model, ranks: tuple[int, int] = (4, 8), strengths: tuple[float, float] = (1.0, 1.0)):
    """LORA_PAIR of two random attention LoRAs."""
    loras = pack.nodes.bridge.lora.loras
    with torch.inference_mode():
        return loras.LoRASources(
            of_two(
                *(
                    loras.LoRASource(name, full_size.attention_lora(model, rank, seed, torch.float32), strength)
                    for seed, (name, rank, strength) in enumerate(
                        zip(("content", "style"), ranks, strengths, strict=True)
                    )
                )
            )
        )


def sample(patcher, seed: int = 0, steps: int = 3) -> Tensor:
    """What the host's own sampler draws: the witness that a model is, or is not, what it was."""
    import comfy.sample

    with torch.inference_mode():
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        positive, negative = prompts()["content"], prompts()["style"]
        return comfy.sample.sample(
            patcher, noise, steps, 3.0, "euler", "normal", positive, negative, torch.zeros(1, 4, 8, 8), seed=seed,
            disable_pbar=True,
        )  # fmt: skip


def kept_for_backward(pack, patcher, pair, prompts, latents, recomputed: int) -> int:
    """Bytes that autograd keeps of a real student pass of both references, each storage once, coefficients apart."""
    storages, vectors = {}, []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    def work(predict, joined, references):
        flat = joined.flatten(pack.ziplora_core.coefficients.Coefficients.ones(pair)).requires_grad_()
        vectors.append(flat.untyped_storage())
        predict._injection.seen = keep  # of blocks that see to it themselves
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            for batch in next(pack.ziplora_core.draws.spread_batches(references, predict, 0, 1)):
                predict(batch, joined.student(flat))

    with torch.inference_mode():
        pack.nodes.bridge.network.predictor.with_predictor(patcher, pair, prompts, latents, work, recomputed=recomputed)
    return sum(storage.nbytes() for key, storage in storages.items() if key != vectors[0]._cdata)


def merged_layers(pack, zipped):
    """(layer name, up, down) of every layer of a zipped LoRA."""
    for name, layer in zipped.fitted.loras.layers.items():
        yield name, *pack.ziplora_core.merge.merged_factors(layer, zipped.coefficients.of_layer(name))
