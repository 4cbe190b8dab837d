"""How well the autoencoders show the second world: figures on the same unseen pictures, and pictures to look at."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from .. import autoencoder as first
from . import atlas, autoencoder, fit_vae, scenes

FIRST = Path(__file__).resolve().parent.parent / "weights" / "miniature_sdxl.safetensors"
COUNT = 256


def first_world() -> first.Autoencoder:
    """The autoencoder of the world of shapes, as it ships."""
    prefix = "first_stage_model."
    state = {k.removeprefix(prefix): v.float() for k, v in load_file(str(FIRST)).items() if k.startswith(prefix)}
    model = first.Autoencoder()
    model.load_state_dict({k: state[k] for k in model.state_dict()})
    return model


def known(work: Path) -> dict[str, first.Autoencoder]:
    """The autoencoders that there are, by name."""
    found: dict[str, first.Autoencoder] = {"first world": first_world()}
    for name in ("vae", "decoder"):
        path = work / "weights" / f"{name}.pt"
        if path.exists():
            found[name] = autoencoder.load(torch.load(path))
    return found


@torch.no_grad()
def reconstruct(model: first.Autoencoder, pictures: Tensor) -> Tensor:
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
