"""Trains one LoRA from its few reference pictures and nothing else, as most LoRAs are: so it leaks, as they do."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import lora
from ..miniature import Miniature, half_is_fast


@dataclasses.dataclass(frozen=True)
class LoRASettings:
    rank: int = 16
    alpha: float = 16.0
    steps: int = 300
    learning_rate: float = 2e-3
    references: int = 8  # per step
    targets: tuple[str, ...] = lora.TARGETS


def fit(
    model: Miniature, pictures: Tensor, prompts: Sequence[str], settings: LoRASettings, seed: int | None = None
) -> dict[str, lora.LoRALinear]:
    """Trains and returns attached branches, which the caller detaches. pictures: B3HW in 0..1, one prompt each.

    seed: None for one that the prompts decide, so that LoRAs that are to be merged start from factors of their own, as
    people's do.
    """
    torch.manual_seed(zlib.crc32("\n".join(prompts).encode()) if seed is None else seed)
    device = model.device
    model.requires_grad_(False)
    with torch.no_grad():
        references = model.vae.encode(pictures.to(device)).float()
    contexts, vectors = model.conditions(prompts)
    branches = lora.attach(model.unet, settings.rank, settings.alpha, settings.targets)
    trained = [p for b in branches.values() for p in (b.down, b.up)]
    optimiser = torch.optim.AdamW(trained, settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(settings.steps):
        warm = min(1.0, (step + 1) / 20)
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        chosen = torch.randint(len(references), (settings.references,)).tolist()
        with torch.autocast(device.type, torch.bfloat16, enabled=half_is_fast(device.type)):
            loss = model.diffusion_loss(references[chosen], contexts[chosen], vectors[chosen]).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
    return branches
