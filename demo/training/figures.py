"""How well the autoencoder shows pictures: figures on unseen ones, and pictures to look at."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from torch import Tensor

from .. import autoencoder
from ..world import atlas, scenes
from . import fit_vae

COUNT = 256


def known(work: Path) -> dict[str, autoencoder.Autoencoder]:
    """With the decoder as it is trained at first, and sharpened, by name."""
    found = {}
    for name in ("vae", "decoder"):
        path = work / "weights" / f"{name}.pt"
        if path.exists():
            found[name] = autoencoder.load(torch.load(path))
    return found


@torch.no_grad()
def reconstruct(model: autoencoder.Autoencoder, pictures: Tensor) -> Tensor:
    return torch.cat([model.decode(model.encode(part)) for part in pictures.split(16)])


def report(work: Path, count: int = COUNT, shown: int = 12) -> None:
    """Prints PSNR and the edge figure of each, and writes `reconstruction.png`: the truth, then one row each."""
    world = scenes.World(atlas.load(work / "atlas.safetensors"))
    pictures = fit_vae.draw(world, count, random.Random("reconstruction"), "cpu").float() / 255
    rows = [pictures[:shown]]
    for name, model in known(work).items():
        decoded = reconstruct(model, pictures)
        found = autoencoder.sharpness(decoded, pictures)
        print(f"{name}: PSNR {found['psnr']:.2f} dB, edges {found['edges']:.3f}, {count} pictures", flush=True)
        rows.append(decoded[:shown])
    atlas.sheet(torch.cat(rows), shown).save(work / "reconstruction.png")
