"""LoRA files: read, or refused with a sentence; written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_MAX_HEADER = 100 * 1024 * 1024  # the format's own limit
_LORA_NAME = re.compile(
    r"lora|lycoris|hada_|lokr_|oft_|dora_scale|\.[ab][12]\.weight$|\.diff(_b)?$|\.set_weight$|\.[wb]_norm$",
    re.IGNORECASE,
)


class LoRAFileError(ValueError):
    """A LoRA file that cannot be used. The message names the file, what was found and what to do."""


def _header(path: Path) -> dict[str, dict[str, object]]:
    """The file's table of tensors, after checking that the file is as long as its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= _MAX_HEADER or length > size - 8:
            raise LoRAFileError(
                f"'{path.name}' is not a safetensors file, or it is cut off ({size:,} bytes); "
                "choose a .safetensors LoRA or download it again"
            )
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise LoRAFileError(
                f"'{path.name}' is not a safetensors file (its header is not JSON); choose a .safetensors LoRA"
            ) from error
    if not isinstance(header, dict):
        raise LoRAFileError(f"'{path.name}' is not a safetensors file (its header is no table of tensors)")
    tensors = {k: v for k, v in header.items() if k != "__metadata__"}
    try:
        expected = 8 + length + max((int(v["data_offsets"][1]) for v in tensors.values()), default=0)
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise LoRAFileError(f"'{path.name}' has a broken safetensors header; download it again") from error
    if size < expected:
        raise LoRAFileError(f"'{path.name}' is cut off: {size:,} bytes found, {expected:,} expected; download it again")
    return tensors


def check_safetensors(path: str | os.PathLike[str]) -> None:
    """Refuse, from its header alone, what is no whole safetensors file. Raises LoRAFileError."""
    path = Path(path)
    if not path.is_file():
        raise LoRAFileError(f"'{path.name}' is missing; choose another file")
    _header(path)


def check_lora_file(path: str | os.PathLike[str]) -> None:
    """Refuse early what cannot be a LoRA, from the header alone: a few milliseconds, nothing allocated.

    Raises LoRAFileError for a missing, truncated or non-safetensors file, or one without any LoRA key.
    """
    path = Path(path)
    if not path.is_file():
        raise LoRAFileError(f"'{path.name}' is missing; put it into the loras folder or choose another file")
    names = _header(path)
    if not any(_LORA_NAME.search(name) for name in names):
        raise LoRAFileError(
            f"'{path.name}' holds no LoRA: none of its {len(names)} tensors has a LoRA name "
            f"({', '.join(sorted(names)[:2]) or 'it is empty'}); choose a LoRA file, not a checkpoint or embedding"
        )


def all_finite(tensor: Tensor) -> bool:
    """In one pass over a tensor of any floating type: its least and greatest number say it, and NaN is both."""
    if tensor.numel() == 0:
        return True
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # float8 has no order
    low, high = torch.aminmax(wide)
    return math.isfinite(low.item()) and math.isfinite(high.item())


def read_lora_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a LoRA file on the CPU, in the file's dtypes.

    Raises LoRAFileError as `check_lora_file` does, and for NaN or Inf, naming the tensor.
    """
    check_lora_file(path)
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            for name in file.keys():  # safe_open is not a mapping
                tensors[name] = file.get_tensor(name)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise LoRAFileError(f"'{path.name}' cannot be read as safetensors ({error}); download it again") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not all_finite(tensor):
            raise LoRAFileError(
                f"'{path.name}' holds NaN or infinite numbers (tensor '{name}'): its training diverged; "
                "use another epoch or file"
            )
    return tensors


def sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically: under another name in the same folder, flushed, then renamed.

    Raises OSError where the folder is missing, read-only or full; nothing is left behind then.
    """
    with whole_or_not_at_all(path) as temporary:
        try:
            save_file({k: t.contiguous() for k, t in tensors.items()}, temporary, dict(metadata))
        except SafetensorError as error:  # its writer's way to say that the disk is full
            raise OSError(f"'{Path(path).name}' could not be written: {error}") from error


@contextlib.contextmanager
def whole_or_not_at_all(path: str | os.PathLike[str]) -> Iterator[str]:
    """A name in the same folder to write under; flushed and renamed to `path` after the block, unless it raised.

    Raises OSError where the folder is missing, read-only or full; nothing is left behind then.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
