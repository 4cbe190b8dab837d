"""The miniature's two text encoders and its word-level tokenizer, in the host's own classes."""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

import comfy.clip_model
import comfy.sdxl_clip
import torch
from comfy import sd1_clip

CONTEXT_L = 48
CONTEXT_G = 80
MAX_TOKENS = 16  # a prompt longer than that becomes several sections, as it does at 77 in SDXL
PAD, START, END, UNKNOWN = 0, 1, 2, 3
SPECIAL = ["<pad>", "<start>", "<end>", "<unknown>"]
WORDS_FILE = pathlib.Path(__file__).parent / "words.json"


def load_vocabulary() -> dict[str, int]:
    """Word -> token. The special tokens come first."""
    words = json.loads(WORDS_FILE.read_text(encoding="utf-8"))
    return {word: i for i, word in enumerate([*SPECIAL, *words])}


def text_config(hidden: int) -> dict[str, Any]:
    """A CLIP text model of three layers; the context is taken after the second, as in SDXL."""
    return {
        "num_hidden_layers": 3,
        "hidden_size": hidden,
        "num_attention_heads": hidden // 16,
        "intermediate_size": 4 * hidden,
        "hidden_act": "gelu",
        "max_position_embeddings": MAX_TOKENS,
        "eos_token_id": END,
        "vocab_size": len(load_vocabulary()),
    }


class Words:
    """A word-level stand-in for the host's CLIPTokenizer."""

    def __init__(self) -> None:
        self.vocabulary = load_vocabulary()

    @classmethod
    def from_pretrained(cls, path: str, **options: Any) -> Words:
        return cls()

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary

    def __call__(self, text: str) -> dict[str, list[int]]:
        words = re.findall(r"[a-z]+", text.lower())
        return {"input_ids": [START, *(self.vocabulary.get(word, UNKNOWN) for word in words), END]}


class _Tokenizer(sd1_clip.SDTokenizer):
    def __init__(
        self, width: int, key: str, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None
    ):
        super().__init__(
            max_length=MAX_TOKENS,
            pad_with_end=False,
            embedding_directory=embedding_directory,
            embedding_size=width,
            embedding_key=key,
            tokenizer_class=Words,
            tokenizer_data=tokenizer_data or {},
        )


class MiniatureTokenizer(comfy.sdxl_clip.SDXLTokenizer):
    def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None):
        self.clip_l = _Tokenizer(CONTEXT_L, "clip_l", embedding_directory, tokenizer_data)
        self.clip_g = _Tokenizer(CONTEXT_G, "clip_g", embedding_directory, tokenizer_data)


class SmallVocabulary(comfy.clip_model.CLIPTextModel):
    """The host's CLIP text model with as many token embeddings as the configuration says."""

    def __init__(self, config_dict: dict[str, Any], dtype: torch.dtype, device: Any, operations: Any):
        super().__init__(config_dict, dtype, device, operations)
        table = operations.Embedding(config_dict["vocab_size"], config_dict["hidden_size"], dtype=dtype, device=device)
        self.set_input_embeddings(table)


def _encoder(hidden: int, name: str, device: Any, dtype: Any, model_options: dict[str, Any]) -> sd1_clip.SDClipModel:
    return sd1_clip.SDClipModel(
        device=device,
        max_length=MAX_TOKENS,
        layer="hidden",
        layer_idx=-2,
        textmodel_json_config=text_config(hidden),
        dtype=dtype,
        model_class=SmallVocabulary,
        special_tokens={"start": START, "end": END, "pad": PAD},
        layer_norm_hidden_state=False,
        return_projected_pooled=True,
        model_options={**model_options, "model_name": name},
    )


class MiniatureClipModel(comfy.sdxl_clip.SDXLClipModel):
    """Two text encoders beside each other: context 48 + 80 wide, pooled vector 80."""

    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] | None = None):
        torch.nn.Module.__init__(self)
        options = model_options or {}
        self.clip_l = _encoder(CONTEXT_L, "clip_l", device, dtype, options)
        self.clip_g = _encoder(CONTEXT_G, "clip_g", device, dtype, options)
        self.dtypes = {dtype}
