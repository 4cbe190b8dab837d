"""From trained parts to a checkpoint, and the words that its tokenizer knows."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open

from ..autoencoder import SDXL_SCALE
from ..miniature import FIRST_STAGE, write_safetensors
from ..world import scenes

WORDS = Path(__file__).resolve().parent.parent / "host_extension" / "words.json"


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
