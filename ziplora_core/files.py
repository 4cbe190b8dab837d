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
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_UNFINISHED = ".ziplora.part"  # ends the name of a file that is being written; no loader lists it
_ABANDONED = 3600.0  # seconds
_MAX_HEADER = 100 * 1024 * 1024  # the format's own limit
_MAX_VALUES = 500_000  # in a header: a hundred times what a LoRA has, and still parsed within a second
_LORA_NAME = re.compile(
    r"lora|lycoris|hada_|lokr_|oft_|dora_scale|\.[ab][12]\.weight$|\.diff(_b)?$|\.set_weight$|\.[wb]_norm$",
    re.IGNORECASE,
)


class LoRAFileError(ValueError):
    """A LoRA file that cannot be used. The message names the file, what was found and what to do."""


def shown(text: str, most: int = 160) -> str:
    """A name or a text out of a file, fit for a sentence: printable, and not long."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[: most + 1])
    return text if len(text) <= most else f"{text[:most]}…"


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
        text = file.read(length)
        if text.count(b",") + text.count(b":") > _MAX_VALUES:
            raise LoRAFileError(
                f"'{path.name}' is no LoRA: its header of {length:,} bytes lists too much; choose another"
            )
        try:
            header = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise LoRAFileError(
                f"'{path.name}' is not a safetensors file (its header is not JSON); choose a .safetensors LoRA"
            ) from error
    if not isinstance(header, dict):
        raise LoRAFileError(f"'{path.name}' is not a safetensors file (its header is no table of tensors)")
    tensors = {k: v for k, v in header.items() if k != "__metadata__"}
    try:
        ends = [v["data_offsets"][1] for v in tensors.values()]
        if not all(isinstance(end, int) and 0 <= end < 2**63 for end in ends):
            raise ValueError("offsets are no places in a file")
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise LoRAFileError(f"'{path.name}' has a broken safetensors header; download it again") from error
    expected = 8 + length + max(ends, default=0)
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
        examples = ", ".join(map(shown, sorted(names)[:2])) or "it is empty"
        raise LoRAFileError(
            f"'{path.name}' holds no LoRA: none of its {len(names)} tensors has a LoRA name "
            f"({examples}); choose a LoRA file, not a checkpoint or embedding"
        )


def all_finite(tensor: Tensor) -> bool:
    """In one pass over a tensor of any floating type: its least and greatest number say it, and NaN is both."""
    if tensor.numel() == 0:
        return True
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # float8 has no order
    low, high = torch.aminmax(wide)
    return math.isfinite(low.item()) and math.isfinite(high.item())


_NUMBERS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
_TOGETHER = (  # endings of matrices that a layer has all or none of
    (".lora_up.weight", ".lora_down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
    (".lora_B.default.weight", ".lora_A.default.weight"),
    (".lora_B", ".lora_A"),
    (".lora.up.weight", ".lora.down.weight"),
    ("_lora.up.weight", "_lora.down.weight"),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    (".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b"),
    (".hada_t1", ".hada_t2"),
    (".lokr_w1_a", ".lokr_w1_b"),
    (".lokr_w2_a", ".lokr_w2_b"),
    (".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight"),
)


def check_tensors(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse what is no LoRA of any model. name: the file's, or the socket's that the tensors came by.

    Raises LoRAFileError, naming the tensor: for NaN or Inf, a kind of number that has no arithmetic, an alpha that is
    not one number, and a matrix without the ones that it is multiplied with.
    """
    for key, tensor in tensors.items():
        _check_numbers(name, key, tensor)
    _check_together(name, tensors)


def _check_numbers(name: str, key: str, tensor: Tensor) -> None:
    if tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype not in _NUMBERS):
        raise LoRAFileError(
            f"'{name}' holds {str(tensor.dtype).removeprefix('torch.')} (tensor '{shown(key)}'), which is not "
            "supported; save it as fp32, fp16 or bf16"
        )
    if tensor.is_floating_point() and not all_finite(tensor):
        raise LoRAFileError(
            f"'{name}' holds NaN or infinite numbers (tensor '{shown(key)}'): its training diverged; "
            "use another epoch or file"
        )


def _check_together(name: str, tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if key.endswith(".alpha") and tensor.numel() != 1:
            raise LoRAFileError(
                f"'{name}' is broken: '{shown(key)}' has shape {tuple(tensor.shape)}, expected one number; "
                "download it again"
            )
        for endings in _TOGETHER:
            stem = next((key.removesuffix(ending) for ending in endings if key.endswith(ending)), None)
            missing = [] if stem is None else [e for e in endings if f"{stem}{e}" not in tensors]
            if missing:
                raise LoRAFileError(
                    f"'{name}' is broken: it has '{shown(key)}' without a '{missing[0]}' beside it; download it again"
                )


def read_lora_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a LoRA file on the CPU, in the file's dtypes.

    Raises LoRAFileError as `check_lora_file` and `check_tensors` do.
    """
    check_lora_file(path)
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            for name in file.keys():  # safe_open is not a mapping
                tensors[name] = file.get_tensor(name).clone()  # it would change whenever the file does
                _check_numbers(path.name, name, tensors[name])  # at once: while the processor still has it
    except (SafetensorError, OSError, RuntimeError) as error:
        raise LoRAFileError(
            f"'{path.name}' cannot be read as safetensors ({shown(str(error))}); download it again"
        ) from error
    _check_together(path.name, tensors)
    return tensors


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """What a file says of itself. Raises LoRAFileError for what is no safetensors file."""
    check_safetensors(path)
    path = Path(path)
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise LoRAFileError(
            f"'{path.name}' cannot be read as safetensors ({shown(str(error))}); download it again"
        ) from error


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
            raise OSError(str(error)) from error


@contextlib.contextmanager
def whole_or_not_at_all(path: str | os.PathLike[str]) -> Iterator[str]:
    """A name in the same folder to write under; flushed and renamed to `path` after the block, unless it raised.

    Raises OSError where the folder is missing, read-only or full; nothing is left behind then. What a process that
    was killed has left there is cleared away.
    """
    path = Path(path)
    with _named(path):
        _clear(path.parent)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_UNFINISHED, dir=path.parent)
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


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises OSError, before long work, where a file could not be written after it: the folder is not there or
    read-only."""
    path = Path(path)
    with _named(path), tempfile.TemporaryFile(dir=path.parent):
        pass


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """What cannot be written is said with its file and folder."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"'{path.name}' could not be written into the folder '{Path(*path.parent.parts[-2:])}' "
            f"({error.strerror or error}); see that it is there, writable and not full, then queue again"
        ) from error


def _clear(folder: Path) -> None:
    """Delete what was begun here long ago and never finished: its writer is gone."""
    for left in folder.glob(f".*{_UNFINISHED}"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED:
                left.unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
