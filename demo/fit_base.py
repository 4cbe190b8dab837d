"""Trains the base: latents of the procedural world, then the UNet and the text encoders together."""

from __future__ import annotations

import dataclasses
import os
import random
import time

import torch
from torch import Tensor

from . import parallel, world
from .autoencoder import Autoencoder
from .averages import Averages
from .miniature import Miniature, save_checkpoint, use_comfyui


@dataclasses.dataclass(frozen=True)
class BaseSettings:
    comfyui: str
    folder: str  # working folder: data, resumable state
    output: str  # checkpoint to write
    device: str = "cpu"
    pictures: int = 24000
    steps: int = 14500
    batch: int = 48  # over all processes
    learning_rate: float = 1.5e-3
    decay_from: float = 0.7  # the rate is constant up to this part of the run, then falls linearly to zero
    ema: float = 0.999
    drop: float = 0.1


def make_latents(autoencoder: Autoencoder, count: int, seed: int, device: str) -> tuple[list[world.Scene], Tensor]:
    """Draws `count` scenes of the base world and encodes them. Returns (scenes, half-precision latents)."""
    rng = random.Random(seed)
    scenes = [world.base_scene(rng) for _ in range(count)]
    chunk = 4 if device == "cpu" else 256
    autoencoder = autoencoder.to(device).to(memory_format=torch.channels_last)
    latents = []
    with torch.no_grad():
        for start in range(0, count, chunk):
            pictures = world.render(scenes[start : start + chunk], device).contiguous(memory_format=torch.channels_last)
            with torch.autocast(device, torch.bfloat16):
                latents.append(autoencoder.encode(pictures).half().cpu().contiguous())
    return scenes, torch.cat(latents)


def _rate(step: int, settings: BaseSettings) -> float:
    warm = min(1.0, (step + 1) / 200)
    done = step / settings.steps
    return warm * min(1.0, (1 - done) / (1 - settings.decay_from)) * settings.learning_rate


def fit(settings: BaseSettings, autoencoder: dict[str, Tensor]) -> None:
    """One process's part of the training; the first one writes the checkpoint."""
    use_comfyui(settings.comfyui)
    started = time.time()
    torch.manual_seed(0)
    model = Miniature()
    model.vae.load_state_dict(autoencoder)
    torch.manual_seed(100 + parallel.rank())
    rng = random.Random(100 + parallel.rank())
    share = settings.pictures // parallel.count()
    cache = os.path.join(settings.folder, f"latents_{parallel.rank()}.pt")
    if not os.path.exists(cache):
        torch.save(make_latents(model.vae, share, 10 + parallel.rank(), settings.device), cache)
    scenes, latents = torch.load(cache, weights_only=False)
    model.vae.to("cpu")
    print(f"drew and encoded {share} pictures in {time.time() - started:.0f} s", flush=True)
    model.to(settings.device)
    latents = latents.to(settings.device)
    trained = model.trained_parameters()
    averages = Averages(trained, settings.ema)
    optimiser = torch.optim.AdamW(trained, settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    state_file = os.path.join(settings.folder, f"base_state_{parallel.rank()}.pt")
    first = 0
    if os.path.exists(state_file):
        state = torch.load(state_file, map_location=settings.device)
        first = state["step"]
        averages.load(state)
        optimiser.load_state_dict(state["optimiser"])
        print(f"resumed at step {first}", flush=True)
    batch = settings.batch // parallel.count()
    token_cache: dict[str, Tensor] = {}
    total = 0.0
    started = time.time()
    for step in range(first, settings.steps):
        for group in optimiser.param_groups:
            group["lr"] = _rate(step, settings)
        chosen = torch.randint(share, (batch,)).tolist()
        prompts = ["" if rng.random() < settings.drop else world.caption(scenes[i], rng) for i in chosen]
        for prompt in prompts:
            if prompt not in token_cache:
                token_cache[prompt] = model.tokens([prompt])
        context, pooled = model.encode_tokens(torch.cat([token_cache[p] for p in prompts]))
        # the pooled text of another sample: alive, and learned to be ignored
        vector = model.vector(pooled.detach()[torch.randperm(batch)])
        with torch.autocast(settings.device, torch.bfloat16):
            loss = model.diffusion_loss(latents[chosen].float(), context, vector).mean()
        optimiser.zero_grad()
        loss.backward()
        parallel.average_gradients(trained)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        averages.follow(step)
        total += float(loss.detach())
        if (step + 1) % 100 == 0:
            print(f"base step {step + 1} loss {total / 100:.4f} {time.time() - started:.0f} s", flush=True)
            total = 0.0
        if (step + 1) % 500 == 0 or step + 1 == settings.steps:
            state = {"step": step + 1, **averages.state(), "optimiser": optimiser.state_dict()}
            torch.save(state, state_file + ".part")
            os.replace(state_file + ".part", state_file)
            if parallel.rank() == 0:
                with averages.in_place():
                    save_checkpoint(model, settings.output)
