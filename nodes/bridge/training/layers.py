"""Which layers of a model, and of its text encoders, are trained."""

from __future__ import annotations

import re

from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from ....ziplora_core.blocks import B_LORA_BLOCKS, Blocks, lies_in
from ....ziplora_core.checks import one_of
from ..lora import text_encoders
from ..network.bare import bare
from ..network.injection import blocks, is_linear

_ATTENTION = re.compile(r"\.(?:attn\d?|attention|self_attn|cross_attn|img_attn|txt_attn)\.")
_TEXT_ATTENTION = re.compile(r"\.self_attn\.(?:q|k|v|o|out)_proj$")
_READ_PROMPTS = re.compile(r"\.attn2\.to_[kv]\.weight$")
LAYERS = ("attention", "all linear", "B-LoRA", "B-LoRA content block", "B-LoRA style block")


def trained_layers(model, which: str, b_lora: Blocks = B_LORA_BLOCKS) -> dict[str, tuple[int, int]]:
    """Layer (`diffusion_model.….weight`) -> (out, in) of the linear layers to train.

    model: the host's BaseModel. which: one of LAYERS. b_lora: the blocks that B-LoRA means. Raises ValueError where
    this model has none of them.
    """
    one_of("layers", which, LAYERS)
    bare(model)
    inside = {id(part) for block in blocks(model) for part in block.modules()}
    layers = {}
    for path, module in model.named_modules():
        if not path.startswith("diffusion_model.") or not hasattr(module, "in_features"):
            continue
        if which == "all linear" and id(module) not in inside:
            continue
        if which != "all linear" and not _ATTENTION.search(f".{path}."):
            continue
        if which.startswith("B-LoRA") and not _in_b_lora(path, which, b_lora):
            continue
        layers[f"{path}.weight"] = (module.out_features, module.in_features)
    if not layers or (which.startswith("B-LoRA") and not isinstance(model.diffusion_model, UNetModel)):
        raise ValueError(
            f"this model ({type(model.model_config).__name__}) has no layers for '{which}'; choose "
            + {"attention": "'all linear'", "all linear": "another model"}.get(
                which, "'attention': B-LoRA's blocks are SDXL's"
            )
        )
    return layers


def prompt_readers(model) -> dict[str, tuple[int, int]]:
    """As `trained_layers`, of the keys and values that cross-attention takes from the prompt. Raises ValueError where
    this model has none of its own for it."""
    every = trained_layers(model, "attention") if isinstance(model.diffusion_model, UNetModel) else {}
    readers = {name: shape for name, shape in every.items() if _READ_PROMPTS.search(name)}
    if not readers:
        raise ValueError(
            f"this model ({type(model.model_config).__name__}) has no layers that read the prompt alone; choose one "
            "that has, such as SD 1.5 or SDXL"
        )
    return readers


def text_layers(clip) -> dict[str, tuple[int, int]]:
    """As `trained_layers`, of the attention of a CLIP's text encoders (`clip_l.….weight`). Raises ValueError where LoRA
    files have no names for any."""
    model = clip.cond_stage_model
    names = text_encoders.kohya_names(model)
    layers = {
        f"{path}.weight": (module.out_features, module.in_features)
        for path, module in model.named_modules()
        if is_linear(module) and _TEXT_ATTENTION.search(path) and f"{path}.weight" in names
    }
    if not layers:
        raise ValueError(
            f"this clip ({type(model).__name__}) has no attention layers that LoRA files can name; connect the text "
            "encoder of a model that has, such as SD 1.5 or SDXL"
        )
    return layers


def _in_b_lora(path: str, which: str, b_lora: Blocks) -> bool:
    return any(lies_in(path, b_lora[concept]) for concept in b_lora if which == "B-LoRA" or concept in which)
