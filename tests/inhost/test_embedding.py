"""Textual Inversion: its gradient, its file in the host's own prompts, and what it leaves behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_training import pictures

WORD, PROMPTS = "*", ["a * in flat style", "a red * on the left in neon style"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    import folder_paths

    endings = folder_paths.folder_names_and_paths["embeddings"][1]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "embeddings", ([str(tmp_path)], endings))
    folder_paths.filename_list_cache.clear()
    return tmp_path


@pytest.fixture
def clip(miniature, folder):
    for name in ("clip_l", "clip_g"):
        getattr(miniature.clip.tokenizer, name).embedding_directory = [str(folder)]
    return miniature.clip


def task(pack, **changes) -> Any:
    Settings = pack.ziplora_core.trained_embedding.Settings
    settings = {"steps": 3, "learning_rate": 1e-2, "vectors": 2} | {
        k: changes.pop(k) for k in list(changes) if k in Settings.__dataclass_fields__
    }
    defaults = {"prompts": PROMPTS, "initial": "star", "resolution": 128}
    return pack.nodes.bridge.training.embedding.Task(
        [pictures(2, 128, 128)], settings=Settings(**settings), **{**defaults, **changes}
    )


def train(pack, loaded, asked):
    with torch.inference_mode():
        return pack.nodes.bridge.training.embedding.train_embedding(loaded.model, loaded.clip, loaded.vae, asked)


def encoded(clip, text: str) -> list:
    with torch.inference_mode():
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def test_first(pack, miniature, clip):
    done = train(pack, miniature, task(pack))
    print(done)
    print(encoded(clip, "a embedding:concept_00001_ in flat style")[0][0].shape)
