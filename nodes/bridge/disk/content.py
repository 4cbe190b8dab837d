"""Values by their content: one hash of everything that a result depends on, or the reason why there is none."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import comfy.model_base
import torch
from comfy.ldm.modules import attention
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy.weight_adapter.base import WeightAdapterBase
from torch import Tensor

from ....ziplora_core.files import bytes_of
from ..network.bare import bare
from ..network.foreign import is_patched
from ..network.weights import is_quantized

_WRITTEN_OUT = ("dequant_dtype", "patch_dtype")  # of a layer of ComfyUI-GGUF's: how it makes its weight
_THREADS = 4  # that read a model at once
# Of a patcher: code and things of other nodes and packs, of which nobody knows what they do.
_OTHERS = ("object_patches", "weight_wrapper_patches", "injections", "hook_patches", "additional_models")
_OF_LORAS = "lora_metadata"  # text that newer hosts' LoRA loaders leave beside their patches


class UnknownContent(Exception):
    """Something has a meaning that its content does not tell. Its text says what."""


def digest(value: Any) -> str:
    """SHA-256, in hexadecimal, of numbers, texts, tensors and the host's weight patches, and of lists and tables of
    these. The same for the same values on any device. Raises UnknownContent for anything else."""
    made = hashlib.sha256()
    _feed(made, value)
    return made.hexdigest()


def _feed(made: hashlib._Hash, value: Any) -> None:
    if (kind := getattr(value, "tensor_type", None)) is not None:  # ComfyUI-GGUF's, whose patches the patcher knows
        made.update(f"blocks {kind} {tuple(value.shape)} ".encode())
        _feed(made, value.data.as_subclass(Tensor))
    elif is_quantized(value):  # of hosts whose state dicts show such tensors whole
        made.update(f"coded {value._layout_type} ".encode())
        _feed(made, value.dequantize())
    elif isinstance(value, Tensor):
        if type(value) not in (Tensor, torch.nn.Parameter) or value.layout != torch.strided or value.is_meta:
            raise UnknownContent(f"a tensor of the kind {type(value).__name__}")
        here = value.detach().cpu().contiguous()
        made.update(f"tensor {here.dtype} {tuple(here.shape)} ".encode())
        made.update(bytes_of(here))
    elif isinstance(value, WeightAdapterBase):
        made.update(f"adapter {type(value).__name__} ".encode())
        _feed(made, list(value.weights))
    elif isinstance(value, Mapping):
        made.update(f"table {len(value)} ".encode())
        for key in sorted(value, key=str):
            _feed(made, key)
            _feed(made, value[key])
    elif isinstance(value, list | tuple):
        made.update(f"list {len(value)} ".encode())
        for part in value:
            _feed(made, part)
    elif value is None or isinstance(value, bool | int | float | str | torch.dtype):
        text = str(value)
        made.update(f"{type(value).__name__} {len(text)} {text} ".encode(errors="surrogatepass"))
    else:
        raise UnknownContent(f"a value of the type {type(value).__name__}")


def _numbers(model: torch.nn.Module) -> dict[str, Any]:
    """A state dict; of layers that show only sizes there, as ComfyUI-GGUF's, the parameters themselves."""
    shown, held = model.state_dict(), dict(model.named_parameters())
    return {k: held[k] if v.is_meta else v for k, v in shown.items() if k in held or not v.is_meta}


_weights: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def _of_weights(patcher) -> str:
    """Of the checkpoint's own weights, whatever the host has patched into them. Read once while a model is loaded."""
    known = _weights.get(patcher.model)
    if known is None:
        backup = patcher.backup
        values = {k: backup[k].weight if k in backup else v for k, v in _numbers(bare(patcher.model)).items()}
        with ThreadPoolExecutor(_THREADS) as pool:
            try:
                hashes = []
                for made in pool.map(digest, values.values()):
                    throw_exception_if_processing_interrupted()
                    hashes.append(made)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        known = _weights[patcher.model] = digest([list(values), hashes])
    return known


def of_model(patcher) -> list[Any]:
    """What a run of a model depends on, for `digest`. patcher: ModelPatcher, unchanged.

    Raises UnknownContent where other nodes or packs have put on it what is no weight patch.
    """
    for name in _OTHERS:
        if getattr(patcher, name, None):
            raise UnknownContent(f"what other nodes have put on the model ({name})")
    beside = dict(getattr(patcher, "attachments", {}))
    said = beside.pop(_OF_LORAS, None)
    if beside:
        raise UnknownContent("what other nodes have put on the model (attachments)")
    for name in ("wrappers", "callbacks"):
        if any(found for kind in getattr(patcher, name, {}).values() for found in kind.values()):
            raise UnknownContent(f"what other nodes have put on the model ({name})")
    model = bare(patcher.model)
    if is_patched(patcher, patcher.model_options):
        raise UnknownContent("what other nodes have put on the model")
    config = model.model_config
    kinds = [model, config, getattr(model, "model_sampling", None), getattr(model, "latent_format", None)]
    return [
        [[part.__qualname__ for part in type(kind).__mro__] for kind in kinds],
        [config.unet_config, getattr(model, "manual_cast_dtype", None), str(getattr(model, "model_type", ""))],
        [patcher.load_device.type, attention.optimized_attention.__name__],
        _of_weights(patcher),
        sorted({str([getattr(m, name, None) for name in _WRITTEN_OUT]) for m in model.modules()}),
        patcher.patches,
        said,
        patcher.model_options,
    ]


def _of_code() -> str | None:
    """None where there are no files to be read."""
    root, host = Path(__file__).resolve().parents[3], Path(comfy.model_base.__file__).resolve().parent
    try:
        files = [
            [path.relative_to(folder.parent).as_posix(), path.read_bytes().hex()]
            for folder in (root / "nodes", root / "ziplora_core", host)
            for path in sorted(folder.rglob("*.py"))
        ]
        return digest(files)
    except OSError:
        return None


_CODE = _of_code()  # when it is loaded: files that are updated meanwhile are not the code that runs


def of_code() -> str:
    """Of this pack's code and the host's that a run goes through: what another version makes of the same may differ.

    Raises UnknownContent where it could not be read when the host started.
    """
    if _CODE is None:
        raise UnknownContent("code whose files could not be read when ComfyUI started")
    return _CODE
