"""What the second world's miniature is built from, and how it is read and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..autoencoder import SDXL_SCALE
from ..miniature import Build, Miniature, load_miniature, write_safetensors
from . import autoencoder, scenes

CONTEXT, POOLED = 48 + 80, 80
UNET: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "num_res_blocks": [1, 1, 1],
    "channel_mult": [1, 2, 2],
    "transformer_depth": [0, 1, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [0, 0, 1, 1, 1, 1],
    "context_dim": CONTEXT,
    "num_head_channels": 32,
    "adm_in_channels": POOLED + 6 * 256,
    "num_classes": "sequential",
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "legacy": False,
}
FIRST_STAGE = "first_stage_model."  # the autoencoder's keys in a checkpoint
WORDS = Path(__file__).parent / "host_extension" / "words.json"


def _autoencoder(state: dict[str, Tensor] | None) -> autoencoder.ArtAutoencoder:
    return autoencoder.ArtAutoencoder() if state is None else autoencoder.load(state)


ART = Build(UNET, _autoencoder, "demo.art.host_extension.text")


def new(state: dict[str, Tensor] | None = None) -> Miniature:
    """An untrained miniature around a trained autoencoder."""
    return Miniature(ART, state)


def load(path: str | Path) -> Miniature:
    """A checkpoint, trainable, in float32."""
    return load_miniature(str(path), ART)


def write_words() -> None:
    """The tokenizer's vocabulary, beside the host extension that uses it."""
    WORDS.write_text(json.dumps(scenes.words(), indent=0) + "\n", encoding="utf-8")


def assemble(work: Path) -> Path:
    """One checkpoint of the trained base and the sharpest decoder that there is. Returns its path.

    Raises FileNotFoundError where the base or the autoencoder is missing, ValueError where the decoder was made for
    another encoder.
    """
    folder = work / "weights"
    first = torch.load(folder / "vae.pt")
    sharper = folder / "decoder.pt"
    vae = torch.load(sharper) if sharper.exists() else first
    for key, value in first.items():
        if key.startswith("taesd_encoder.") and not torch.equal(value, vae[key]):
            raise ValueError(f"{sharper} has another encoder than vae.pt ({key} differs): remove it, train it again")
    with safe_open(str(folder / "base.safetensors"), framework="pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}
        metadata = file.metadata()
    state |= {FIRST_STAGE + key: value.half().contiguous() for key, value in vae.items()}
    state[FIRST_STAGE + "vae_scale"] = torch.tensor(SDXL_SCALE)
    state[FIRST_STAGE + "vae_shift"] = torch.tensor(0.0)
    path = folder / "miniature_sdxl.safetensors"
    write_safetensors(state, str(path), metadata)
    return path
