"""Trains the autoencoder on crops of scenes; resumable."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import time
from pathlib import Path

import torch
from torch import Tensor

from .. import autoencoder
from ..world import atlas, scenes
from ..world.techniques import TECHNIQUES
from . import parallel

CROP = 64
CELL = 8  # crops start at whole cells, where the patterns of techniques do
NOISE = (0.1, 0.015)  # on the latents, from the first step to the last
NEW_SHARE = 0.25  # pictures in techniques and sets that the base never sees: what is merged must be drawable


@dataclasses.dataclass(frozen=True)
class VaeSettings:
    """`picture_count` scenes are drawn anew for every `fresh` steps; `work` holds the atlas and gets the weights."""

    work: Path
    device: str = "cpu"
    picture_count: int = 1500
    fresh: int = 1500
    steps: int = 8000
    batch: int = 24
    learning_rate: float = 2e-3
    save_seconds: float = 120.0


ON_A_GPU = {"picture_count": 20000, "fresh": 2000, "steps": 6000, "batch": 192}


def any_scene(world: scenes.World, rng: random.Random) -> scenes.Scene:
    """A scene of the base, or one with a set or a technique that the base does not know."""
    if rng.random() > NEW_SHARE:
        return world.base_scene(rng)
    subject, word = rng.choice(world.atlas.keys)
    one_color = scenes.SETS[word].one_color
    technique = None if one_color or rng.random() < 0.3 else rng.choice(list(TECHNIQUES))
    return scenes.set_out(subject, word, technique, rng)


def draw(world: scenes.World, count: int, rng: random.Random, device: str) -> Tensor:
    """count x 3 x 128 x 128 bytes."""
    chunk = 8 if device == "cpu" else 256
    wanted = [any_scene(world, rng) for _ in range(count)]
    parts = [scenes.render(world.atlas, wanted[i : i + chunk], device) for i in range(0, count, chunk)]
    return torch.cat([(part * 255).round().byte() for part in parts])


def crops(pictures: Tensor, count: int, rng: random.Random) -> Tensor:
    out = []
    for _ in range(count):
        top, left = (CELL * rng.randint(0, (atlas.SIZE - CROP) // CELL) for _ in range(2))
        out.append(pictures[rng.randrange(len(pictures)), :, top : top + CROP, left : left + CROP])
    return (torch.stack(out).float() / 255).contiguous(memory_format=torch.channels_last)


def fit(settings: VaeSettings) -> None:
    """One process's part; the first one writes the averaged weights and, to go on from, everything."""
    torch.manual_seed(0)
    rank, count, device = parallel.rank(), parallel.count(), settings.device
    world = scenes.World(atlas.load(settings.work / "atlas.safetensors"))
    output = settings.work / "weights" / "vae.pt"
    model = autoencoder.Autoencoder().to(device).to(memory_format=torch.channels_last)
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    average = {k: v.clone() for k, v in model.state_dict().items()}
    begin = 0
    state_file = output.with_suffix(".state")
    if state_file.exists():
        state = torch.load(state_file, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, begin = state["average"], state["step"]
    torch.manual_seed(5 + rank + 97 * begin)
    started, saved, total, seen = time.time(), time.time(), 0.0, 0
    pictures = None
    for step in range(begin, settings.steps):
        if pictures is None or step % settings.fresh == 0:
            rng = random.Random(f"vae {rank} {step}")
            pictures = draw(world, settings.picture_count // count, rng, device)
        done = step / settings.steps
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / 100)
            group["lr"] = settings.learning_rate * warm * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))
        noise = NOISE[0] * (NOISE[1] / NOISE[0]) ** min(1.0, 1.5 * done)
        view = crops(pictures, max(1, settings.batch // count), rng)
        with parallel.half(device):
            loss, pixel = autoencoder.loss(model, view, noise)
        optimizer.zero_grad()
        loss.backward()
        parallel.average_gradients(params)
        torch.nn.utils.clip_grad_norm_(params, 0.5)
        optimizer.step()
        keep = min(0.995, (step + 1) / (step + 20))
        with torch.no_grad():
            for k, v in model.state_dict().items():
                average[k].lerp_(v, 1 - keep)
        total, seen = total + float(pixel), seen + 1
        if rank == 0 and (step + 1) % 100 == 0:
            print(f"vae step {step + 1} L1 {total / seen:.4f} {time.time() - started:.0f} s", flush=True)
            total, seen = 0.0, 0
        if rank == 0 and (time.time() - saved > settings.save_seconds or step + 1 == settings.steps):
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
            save({**state, "step": step + 1}, state_file)
            save({k: v.cpu().contiguous() for k, v in average.items()}, output)
            saved = time.time()


def save(state: object, path: Path) -> None:
    """torch.save, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(path.suffix + ".part")
    torch.save(state, temporary)
    os.replace(temporary, path)
