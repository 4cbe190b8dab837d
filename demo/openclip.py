"""The second text encoder's weights as SDXL's files name them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def openclip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The second encoder's weights under SDXL's OpenCLIP names (fused q, k, v)."""
    out: dict[str, Tensor] = {}
    fused: dict[str, dict[str, Tensor]] = {}
    names = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    inner = {
        "self_attn.out_proj": "attn.out_proj",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    for key, value in state.items():
        if key in names:
            out[names[key]] = value
        elif key == "text_projection.weight":
            out["text_projection"] = value.T.contiguous()
        elif key.startswith("text_model.encoder.layers."):
            _, _, _, number, rest = key.split(".", 4)
            place = f"transformer.resblocks.{number}."
            module, kind = rest.rsplit(".", 1)
            if module in inner:
                out[f"{place}{inner[module]}.{kind}"] = value
            else:
                fused.setdefault(f"{place}attn.in_proj_{kind}", {})[module[-6]] = value
    for key, parts in fused.items():
        out[key] = torch.cat([parts[letter] for letter in "qkv"])
    return out
