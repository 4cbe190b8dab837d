"""Results of finished stages that the repository keeps: a training elsewhere goes on from them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .fit_vae import save

VAE = Path(__file__).resolve().parent / "settled" / "vae.safetensors"


def keep(work: Path) -> None:
    """The autoencoder, in half precision."""
    state = torch.load(work / "weights" / "vae.pt")
    VAE.parent.mkdir(exist_ok=True)
    save_file({key: value.half().contiguous() for key, value in state.items()}, VAE)


def take(work: Path) -> None:
    """Into a folder that has no autoencoder of its own."""
    path = work / "weights" / "vae.pt"
    if not path.exists():
        save({key: value.float() for key, value in load_file(VAE).items()}, path)
