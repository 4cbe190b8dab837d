"""Trains one LoRA from its few reference pictures, beside prior preservation."""

from __future__ import annotations

import dataclasses
import math
import random

import torch
from torch import Tensor

from . import lora, world
from .concepts import Concept
from .fit_base import make_latents
from .miniature import Miniature


@dataclasses.dataclass(frozen=True)
class LoRASettings:
    rank: int = 16
    alpha: float = 16.0
    steps: int = 300
    learning_rate: float = 2e-3
    references: int = 8  # per step
    priors: int = 8  # per step
    prior_weight: float = 1.0


def prior_set(model: Miniature, count: int = 256, seed: int = 77) -> tuple[list[world.Scene], Tensor]:
    """Scenes of the base world and their latents, for prior preservation."""
    scenes, latents = make_latents(model.vae, count, seed, model.device.type)
    return scenes, latents.float()


def fit(
    model: Miniature,
    concept: Concept,
    settings: LoRASettings,
    priors: tuple[list[world.Scene], Tensor],
    seed: int = 0,
) -> dict[str, lora.LoRALinear]:
    """Trains and returns attached branches; the caller detaches them.

    The references teach the concept. On prompts of the base's own world the LoRA is asked to predict what the
    bare base predicts, which keeps it from changing everything else.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    device = model.device
    model.requires_grad_(False)
    with torch.no_grad():
        references = model.vae.encode(world.render(concept.scenes).to(device)).float()
    contexts, vectors = model.conditions(concept.prompts)
    prior_scenes, prior_latents = priors
    branches = lora.attach(model.unet, settings.rank, settings.alpha)
    for branch in branches.values():
        branch.to(device)
    trained = [p for b in branches.values() for p in (b.down, b.up)]
    optimiser = torch.optim.AdamW(trained, settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(settings.steps):
        warm = min(1.0, (step + 1) / 20)
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        chosen = torch.randint(len(references), (settings.references,)).tolist()
        others = torch.randint(len(prior_scenes), (settings.priors,)).tolist()
        # a nameless figure is sometimes given a made-up name: never this concept's own
        prompts = [world.caption(prior_scenes[i], rng, not_named=concept.identifier) for i in others]
        context, vector = model.conditions(prompts)
        latents = torch.cat([references[chosen], prior_latents[others].to(device)])
        context = torch.cat([contexts[chosen], context])
        vector = torch.cat([vectors[chosen], vector])
        # stratified over the references and over the priors apart
        steps = torch.cat([_steps(settings.references, device), _steps(settings.priors, device)])
        noise = torch.randn_like(latents)
        alpha, sigma = model.alpha_sigma(steps)
        noisy, target = alpha * latents + sigma * noise, alpha * noise - sigma * latents
        n = settings.references
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                _strength(branches, 0.0)
                bare = model.predict(noisy[n:], steps[n:], context[n:], vector[n:]).float()
                _strength(branches, 1.0)
            out = model.predict(noisy, steps, context, vector).float()
        loss = (out[:n] - target[:n]).square().mean()
        loss = loss + settings.prior_weight * (out[n:] - bare).square().mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
    return branches


def _steps(count: int, device: torch.device) -> Tensor:
    return ((torch.randperm(count, device=device) + torch.rand(count, device=device)) / count * 1000).long()


def _strength(branches: dict[str, lora.LoRALinear], value: float) -> None:
    for branch in branches.values():
        branch.strength = value
