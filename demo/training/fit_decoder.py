"""Sharpens the decoder alone, after the base is trained: latents stay what they are, so the base still fits.

The loss adds to the autoencoder's own a perceptual one, on maps of the judge's trunk, and towards the end a small
adversarial one of a network that looks at patches.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import autoencoder, judge
from ..autoencoder import edges
from ..world import atlas, scenes
from . import fit_vae, parallel

BLOCKS = (3, 3, 2, 1)  # deeper than while the encoder was trained: new blocks start as the identity


@dataclasses.dataclass(frozen=True)
class DecoderSettings:
    """The adversarial loss comes in `adversarial_from` of the way."""

    steps: int = 5000
    batch: int = 12
    picture_count: int = 1500
    fresh: int = 1500
    learning_rate: float = 1e-3
    noise: float = 0.03
    perceptual: float = 0.05
    adversarial: float = 0.01
    adversarial_from: float = 0.5
    save_seconds: float = 120.0


ON_A_GPU = DecoderSettings(steps=4000, batch=128, picture_count=20000, fresh=2000)


class Patches(nn.Module):
    """Says of every patch of about 22 pixels whether it is a true one (above zero) or a decoded one."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.GroupNorm(8, 2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, 3, padding=1),
        )

    def forward(self, pictures: Tensor) -> Tensor:
        return self.layers(pictures * 2 - 1)


def perceptual(shown: Sequence[Tensor], true: Sequence[Tensor]) -> Tensor:
    """Mean difference of the maps, each by the mean of the true one."""
    parts = [(a - b).abs().mean() / b.abs().mean().clamp(min=1e-3) for a, b in zip(shown, true, strict=True)]
    return torch.stack(parts).mean()


def fit(work: Path, device: str, settings: DecoderSettings) -> None:
    """One process's part; the first one writes `decoder.pt`, a whole autoencoder with the old encoder."""
    rank, count = parallel.rank(), parallel.count()
    folder = work / "weights"
    world = scenes.World(atlas.load(work / "atlas.safetensors"))
    jury = judge.load(folder / "judge.safetensors").to(device).requires_grad_(False)
    model = autoencoder.load(torch.load(folder / "vae.pt"), BLOCKS).to(device).to(memory_format=torch.channels_last)
    torch.manual_seed(0)
    critic = Patches().to(device).to(memory_format=torch.channels_last)
    params, critics = list(model.taesd_decoder.parameters()), list(critic.parameters())
    optimizer = torch.optim.AdamW(params, settings.learning_rate, betas=(0.8, 0.98), weight_decay=0.0)
    critic_optimizer = torch.optim.AdamW(critics, settings.learning_rate / 2, betas=(0.5, 0.98), weight_decay=0.0)
    average = {k: v.clone() for k, v in model.state_dict().items()}
    parts = {"model": model, "critic": critic, "optimizer": optimizer, "critic_optimizer": critic_optimizer}
    state_file, begin = folder / "decoder.state", 0
    if state_file.exists():
        state = torch.load(state_file, map_location=device)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        average, begin = state["average"], state["step"]
    torch.manual_seed(7 + rank + 97 * begin)
    started, saved, pictures = time.time(), time.time(), None
    for step in range(begin, settings.steps):
        if pictures is None or step % settings.fresh == 0:
            rng = random.Random(f"decoder {rank} {step}")
            pictures = fit_vae.draw(world, settings.picture_count // count, rng, device)
        for group in (*optimizer.param_groups, *critic_optimizer.param_groups):
            group.setdefault("full", group["lr"])
            group["lr"] = group["full"] * min(1.0, (step + 1) / 100) * (1 - step / settings.steps)
        view = fit_vae.crops(pictures, max(1, settings.batch // count), rng)
        with torch.no_grad():
            latents = model.encode(view)
        decoded = model.decode(latents + settings.noise * torch.randn_like(latents))
        pixel = (decoded - view).abs().mean()
        sharp = sum((a - b).abs().mean() for a, b in zip(edges(decoded), edges(view), strict=True))
        seen = perceptual(jury.features(decoded), jury.features(view))
        loss = pixel + 0.5 * sharp + settings.perceptual * seen
        against = step >= settings.adversarial_from * settings.steps
        if against:
            loss = loss - settings.adversarial * critic(decoded).mean()
        optimizer.zero_grad()
        loss.backward()
        parallel.average_gradients(params)
        torch.nn.utils.clip_grad_norm_(params, 0.5)
        optimizer.step()
        if against or step + 200 >= settings.adversarial_from * settings.steps:  # the critic learns a little before
            hinge = F.relu(1 - critic(view)).mean() + F.relu(1 + critic(decoded.detach())).mean()
            critic_optimizer.zero_grad()
            hinge.backward()
            parallel.average_gradients(critics)
            critic_optimizer.step()
        with torch.no_grad():
            for k, v in model.state_dict().items():
                average[k].lerp_(v, 1 - min(0.998, (step + 1) / (step + 20)))
        if rank == 0 and (step + 1) % 100 == 0:
            said = f"L1 {pixel.item():.4f} edges {float(sharp):.4f} perceptual {seen.item():.3f}"
            print(f"decoder step {step + 1} {said} {time.time() - started:.0f} s", flush=True)
        if rank == 0 and (time.time() - saved > settings.save_seconds or step + 1 == settings.steps):
            state = {name: part.state_dict() for name, part in parts.items()}
            fit_vae.save({**state, "average": average, "step": step + 1}, state_file)
            fit_vae.save({k: v.cpu().contiguous() for k, v in average.items()}, folder / "decoder.pt")
            saved = time.time()
