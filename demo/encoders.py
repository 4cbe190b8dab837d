"""A CLIP ViT-L and a DINOv2-large of random numbers, so that a graph with them can be run where the real ones are not.

The host tells the encoders apart by their layers, so they have the real sizes (1.5 GB in half precision, kept and made
once). Scores from them mean nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from devhost.base import link
from devhost.host import DEV
from devhost.templates.words import CLIP, DINO

_WIDE, _TEXT, _LAYERS, _PATCH = 1024, 768, 24, 14
Shapes = Iterator[tuple[str, tuple[int, ...]]]


EVERY = (CLIP, DINO)


def provide(base: Path, *names: str) -> None:
    """Put those of `EVERY` that are named into a base directory, where Load CLIP Vision and Load CLIP look."""
    for folder, name in (("clip_vision", CLIP), ("clip_vision", DINO), ("clip", CLIP)):
        if name in names:
            (base / "models" / folder).mkdir(parents=True, exist_ok=True)
            made = _make(DEV / "encoders" / name, (_clip if name == CLIP else _dino)())
            link(made, base / "models" / folder / name)


def _make(path: Path, shapes: Shapes) -> Path:
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        g = torch.Generator().manual_seed(0)
        temporary = path.with_suffix(".tmp")
        save_file({name: _numbers(name, shape, g) for name, shape in shapes}, temporary)
        os.replace(temporary, path)
    return path


def _numbers(name: str, shape: tuple[int, ...], g: torch.Generator) -> torch.Tensor:
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=torch.float16)
    if len(shape) == 1 and "class_embedding" not in name:
        return torch.ones(shape, dtype=torch.float16)
    return (torch.randn(shape, generator=g) * shape[-1] ** -0.5).half()


def _linear(name: str, outputs: int, inputs: int) -> Shapes:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def _norm(name: str, width: int) -> Shapes:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _clip() -> Shapes:
    for tower, width, layers in (("vision_model", _WIDE, _LAYERS), ("text_model", _TEXT, 12)):
        for layer in range(layers):
            at = f"{tower}.encoder.layers.{layer}"
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                yield from _linear(f"{at}.self_attn.{part}", width, width)
            yield from _linear(f"{at}.mlp.fc1", 4 * width, width)
            yield from _linear(f"{at}.mlp.fc2", width, 4 * width)
            yield from _norm(f"{at}.layer_norm1", width)
            yield from _norm(f"{at}.layer_norm2", width)
    yield "vision_model.embeddings.class_embedding", (_WIDE,)
    yield "vision_model.embeddings.patch_embedding.weight", (_WIDE, 3, _PATCH, _PATCH)
    yield "vision_model.embeddings.position_embedding.weight", ((224 // _PATCH) ** 2 + 1, _WIDE)
    yield from _norm("vision_model.pre_layrnorm", _WIDE)
    yield from _norm("vision_model.post_layernorm", _WIDE)
    yield "visual_projection.weight", (_TEXT, _WIDE)
    yield "text_model.embeddings.token_embedding.weight", (49408, _TEXT)
    yield "text_model.embeddings.position_embedding.weight", (77, _TEXT)
    yield from _norm("text_model.final_layer_norm", _TEXT)
    yield "text_projection.weight", (_TEXT, _TEXT)


def _dino() -> Shapes:
    for layer in range(_LAYERS):
        at = f"encoder.layer.{layer}"
        for part in ("attention.query", "attention.key", "attention.value", "output.dense"):
            yield from _linear(f"{at}.attention.{part}", _WIDE, _WIDE)
        yield from _linear(f"{at}.mlp.fc1", 4 * _WIDE, _WIDE)
        yield from _linear(f"{at}.mlp.fc2", _WIDE, 4 * _WIDE)
        for part in ("1", "2"):
            yield from _norm(f"{at}.norm{part}", _WIDE)
            yield f"{at}.layer_scale{part}.lambda1", (_WIDE,)
    yield "embeddings.cls_token", (1, 1, _WIDE)
    yield "embeddings.mask_token", (1, _WIDE)
    yield "embeddings.position_embeddings", (1, (518 // _PATCH) ** 2 + 1, _WIDE)
    yield "embeddings.patch_embeddings.projection.weight", (_WIDE, 3, _PATCH, _PATCH)
    yield "embeddings.patch_embeddings.projection.bias", (_WIDE,)
    yield from _norm("layernorm", _WIDE)
