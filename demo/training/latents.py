"""Scenes of the base as latents, in numbered files, each made again from its number alone; and a hash of what they are.

Training reads them all; making them can stop and go on at any time, and several processes may share the work.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .. import autoencoder
from ..world import atlas, scenes, subjects, techniques
from . import parallel
from .fit_vae import save

SHARD = 2000


def shard_scenes(world: scenes.World, number: int) -> list[scenes.Scene]:
    """The scenes of a file, always the same."""
    rng = random.Random(f"base {number}")
    return [world.base_scene(rng) for _ in range(SHARD)]


def digest(world: scenes.World, settings: object = None) -> str:
    """Which data a training saw: the atlas, the rules that make scenes of it, and the settings."""
    found = hashlib.sha256(world.atlas.digest.encode())
    for module in (scenes, subjects, techniques):
        found.update(Path(module.__file__ or "").read_bytes())
    found.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return found.hexdigest()


@torch.no_grad()
def encode(model: autoencoder.Autoencoder, world: scenes.World, wanted: Sequence[scenes.Scene]) -> Tensor:
    """B x 4 x 16 x 16 in half precision, on the CPU; drawn and encoded where the model is."""
    device = next(model.parameters()).device
    chunk = 8 if device.type == "cpu" else 250
    out = []
    for i in range(0, len(wanted), chunk):
        pictures = scenes.render(world.atlas, wanted[i : i + chunk], device)
        pictures = ((pictures * 255).round() / 255).contiguous(memory_format=torch.channels_last)
        out.append(model.encode(pictures).half().cpu().contiguous())
    return torch.cat(out)


def name(work: Path, number: int) -> Path:
    return work / "latents" / f"{number:03d}.pt"


def make(work: Path, shards: int, device: str) -> None:
    """One process's share of the files that are missing. They belong to one autoencoder: a new one removes them."""
    weights = work / "weights" / "vae.pt"
    model = autoencoder.load(torch.load(weights)).to(device).to(memory_format=torch.channels_last).eval()
    world = scenes.World(atlas.load(work / "atlas.safetensors"))
    for number in range(parallel.rank(), shards, parallel.count()):
        path = name(work, number)
        if not path.exists():
            save(encode(model, world, shard_scenes(world, number)), path)
            print(f"latents {number + 1} of {shards}", flush=True)


def read(work: Path, shards: int) -> Tensor:
    """All of them, N x 4 x 16 x 16 in half precision."""
    return torch.cat([torch.load(name(work, number)) for number in range(shards)])
