"""Trains the autoencoder on crops of the base world's pictures."""

from __future__ import annotations

import math
import os
import random
import time

import torch
from torch import Tensor

from . import autoencoder, parallel, world

CROP = 64
NOISE = (0.1, 0.015)  # on the latents, from the first step to the last


def _pictures(count: int, seed: int, device: str) -> Tensor:
    rng = random.Random(seed)
    chunk = 4 if device == "cpu" else 256
    scenes = [world.base_scene(rng) for _ in range(count)]
    parts = [world.render(scenes[i : i + chunk], device) for i in range(0, count, chunk)]
    return torch.cat([(p * 255).round().byte() for p in parts])


def _crops(pictures: Tensor, count: int, rng: random.Random) -> Tensor:
    out = []
    for _ in range(count):
        picture = pictures[rng.randrange(len(pictures))]
        top, left = rng.randint(0, world.SIZE - CROP), rng.randint(0, world.SIZE - CROP)
        crop = picture[:, top : top + CROP, left : left + CROP]
        out.append(crop.flip(-1) if rng.random() < 0.5 else crop)
    return (torch.stack(out).float() / 255).contiguous(memory_format=torch.channels_last)


def fit(path: str, device: str, pictures: int, steps: int, batch: int, decoder_only: bool = False) -> None:
    """One process's part; the first one writes the averaged weights to `path` (a torch file).

    An existing file is continued. With `decoder_only` the latents stay what they are, so that a finished base
    still fits.
    """
    torch.manual_seed(0)
    rng = random.Random(parallel.rank())
    model = autoencoder.Autoencoder()
    if os.path.exists(path):
        model.load_state_dict(torch.load(path))
    model = model.to(device).to(memory_format=torch.channels_last)
    torch.manual_seed(5 + parallel.rank())
    data = _pictures(pictures // parallel.count(), 1 + parallel.rank(), device)
    params = list((model.taesd_decoder if decoder_only else model).parameters())
    optimiser = torch.optim.AdamW(params, 2e-3, betas=(0.9, 0.98), weight_decay=0.0)
    average = {k: v.clone() for k, v in model.state_dict().items()}
    started, total = time.time(), 0.0
    for step in range(steps):
        done = step / steps
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 100) * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))
        noise = NOISE[1] if decoder_only else NOISE[0] * (NOISE[1] / NOISE[0]) ** min(1.0, 1.5 * done)
        crops = _crops(data, max(1, batch // parallel.count()), rng)
        with torch.autocast(device, torch.bfloat16):
            loss, pixel = autoencoder.loss(model, crops, noise, decoder_only)
        optimiser.zero_grad()
        loss.backward()
        parallel.average_gradients(params)
        torch.nn.utils.clip_grad_norm_(params, 0.5)
        optimiser.step()
        keep = min(0.995, (step + 1) / (step + 20))
        with torch.no_grad():
            for k, v in model.state_dict().items():
                average[k].lerp_(v, 1 - keep)
        total += float(pixel)
        if parallel.rank() == 0 and (step + 1) % 100 == 0:
            print(f"vae step {step + 1} L1 {total / 100:.4f} {time.time() - started:.0f} s", flush=True)
            total = 0.0
        if parallel.rank() == 0 and ((step + 1) % 500 == 0 or step + 1 == steps):
            torch.save({k: v.cpu().contiguous() for k, v in average.items()}, path + ".part")
            os.replace(path + ".part", path)
