"""CSD, the network of style descriptors (Somepalli et al., arXiv 2404.01292), from its published file."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import comfy.clip_vision
import comfy.utils
import folder_paths
import torch
from torch import Tensor

from ...ziplora_core.files import shown
from .lora.hashes import Version, version

FOLDER = "clip_vision"
_TRUNK, _HEAD = "backbone.", "last_layer_style"
_LAYERS = 24  # of ViT-L, the only one that was published
_OUTER = (
    "class_embedding",
    "positional_embedding",
    "conv1.weight",
    *(f"{norm}.{kind}" for norm in ("ln_pre", "ln_post") for kind in ("weight", "bias")),
)
_OF_A_LAYER = (
    *(f"{norm}.{kind}" for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")),
    *(f"attn.{part}" for part in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")),
    *(f"mlp.{part}.{kind}" for part in ("c_fc", "c_proj") for kind in ("weight", "bias")),
)
_NAMES = (*_OUTER, *(f"transformer.resblocks.{n}.{part}" for n in range(_LAYERS) for part in _OF_A_LAYER))


def path_of(name: str) -> str:
    """Full path of a file in the host's clip_vision folders. Raises ValueError where there is none."""
    path = folder_paths.get_full_path(FOLDER, name) if isinstance(name, str) else None  # the API may say anything
    if path is None:
        raise ValueError(f"csd: '{shown(str(name))}' is missing; put it into models/{FOLDER} or choose another file")
    return path


def fingerprint(name: str) -> Version:
    """Changes when the file does. Raises ValueError where there is none."""
    return version(path_of(name))


def load(name: str):
    """The host's CLIP vision model whose `image_embeds` are style descriptors, (pictures, 768), not yet of length 1.

    name: of a file in the host's clip_vision folders: the authors' checkpoint, a pickle with the training's settings
    and optimizers beside `model_state_dict`, or its tensors alone, with or without `module.` before their names.
    Raises ValueError, which names the file and what it holds, for any other.
    """
    path, title = path_of(name), f"csd: '{shown(str(name), 255)}'"
    tensors = _tensors(path, title)
    if _HEAD not in tensors:
        some = ", ".join(shown(key, 60) for key in list(tensors)[:3])
        raise ValueError(
            f"{title} is no CSD file: of its {len(tensors)} tensors{some and f' ({some}, …)'} none is {_HEAD}; choose "
            "CSD's own checkpoint, CSD-ViT-L"
        )
    lacking = [key for key in _NAMES if _TRUNK + key not in tensors]
    if lacking:
        raise ValueError(
            f"{title} lacks {len(lacking)} of the {len(_NAMES)} tensors of CSD's ViT-L, such as {_TRUNK}{lacking[0]}; "
            "choose CSD-ViT-L, or download it again"
        )
    trunk = {_TRUNK + key: tensors[_TRUNK + key] for key in _NAMES}
    try:
        # As CLIP's own file has it: the head in the place of CLIP's projection.
        return comfy.clip_vision.load_clipvision_from_sd({**trunk, f"{_TRUNK}proj": tensors[_HEAD]}, _TRUNK, True)
    except RuntimeError as error:
        raise ValueError(f"{title} has other shapes than CSD's ViT-L: {shown(str(error), 400)}") from error


def _tensors(path: str, title: str) -> Mapping[str, Tensor]:
    """A file's tensors under the names that the network gives them. Nothing in a pickle runs."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the settings in the authors' file
            found = comfy.utils.load_torch_file(path, safe_load=True)
        found = found.get("model_state_dict", found)
        return {key.removeprefix("module."): tensor for key, tensor in found.items() if isinstance(tensor, Tensor)}
    except Exception as error:  # readers of broken files raise anything
        raise ValueError(
            f"{title} cannot be read as a file of tensors ({type(error).__name__}); download CSD-ViT-L again"
        ) from error
