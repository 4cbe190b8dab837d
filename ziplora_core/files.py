"""LoRA files: read, or refused with a sentence."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import formats

_MAX_HEADER = 100 * 1024 * 1024  # the format's own limit
_MAX_VALUES = 500_000  # in a header: a hundred times what a LoRA has, and still parsed within a second
_MOST_AXES = 16
_WORTH_A_THREAD = 2**24  # bytes to hash
DTYPES = {  # by the format's names
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}  # fmt: skip


class LoRAFileError(ValueError):
    """A LoRA file that cannot be used. The message names the file, what was found and what to do."""


def shown(text: str, most: int = 160) -> str:
    """A name or a text out of a file, fit for a sentence: printable, and not long."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[: most + 1])
    return text if len(text) <= most else f"{text[:most]}…"


@dataclass(frozen=True)
class Place:
    """Where a tensor stands in a file: bytes from `start` to `end`, counted from the first after the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class OpenFile:
    """A safetensors file that is open: its table of tensors, in the order of the file, and its metadata.

    Read plainly. A memory map, as the library's own readers use it, ends the whole process where a file is cut off
    while it is read, or its disk goes away; a plain read raises, or returns too little, and both become a sentence.
    """

    def __init__(self, name: str, file: io.FileIO, digest: hashlib._Hash | None) -> None:
        """name: for errors. digest: updated with every byte of the file, in order, once `tensors` is used up."""
        self.name, self._file, self._digest = name, file, digest
        self.places, self.metadata = self._header()
        self._numbers = file.tell()

    def _header(self) -> tuple[dict[str, Place], dict[str, str]]:
        name, size = self.name, os.fstat(self._file.fileno()).st_size
        start = self._bytes(min(8, size))
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= _MAX_HEADER or length > size - 8:
            raise LoRAFileError(
                f"'{name}' is not a safetensors file, or it is cut off ({size:,} bytes); "
                "choose a .safetensors LoRA or download it again"
            )
        text = self._bytes(length)
        if text.count(b",") + text.count(b":") > _MAX_VALUES:
            raise LoRAFileError(f"'{name}' is no LoRA: its header of {length:,} bytes lists too much; choose another")
        try:
            header = json.loads(text.decode(), parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise LoRAFileError(
                f"'{name}' is not a safetensors file (its header is not JSON); choose a .safetensors LoRA"
            ) from error
        if not isinstance(header, dict):
            raise LoRAFileError(f"'{name}' is not a safetensors file (its header is no table of tensors)")
        try:
            metadata = _metadata(header.pop("__metadata__", None))
            places = {key: _place(name, key, entry) for key, entry in header.items()}
            "".join(places).encode()  # half a character cannot be
            places = dict(sorted(places.items(), key=lambda item: (item[1].start, item[1].end)))
            end = 0
            for place in places.values():
                if place.start != end:
                    raise ValueError("holes, or tensors that overlap")
                end = place.end
        except (TypeError, KeyError, ValueError) as error:
            if isinstance(error, LoRAFileError):
                raise
            raise LoRAFileError(
                f"'{name}' cannot be read: its safetensors header is broken; download it again"
            ) from error
        expected = 8 + length + end
        if size != expected:
            raise LoRAFileError(
                f"'{name}' is {'cut off' if size < expected else 'longer than its header says'}: {size:,} bytes "
                f"found, {expected:,} expected; download it again"
            )
        return places, metadata

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor on the CPU, in memory of its own, read when it is asked for. Raises LoRAFileError, OSError."""
        large = self._digest is not None and sum(p.end - p.start for p in self.places.values()) > _WORTH_A_THREAD
        with futures.ThreadPoolExecutor(1) if large else contextlib.nullcontext() as pool:
            hashed: list[futures.Future[None]] = []
            for key, place in self.places.items():
                try:
                    tensor = torch.empty(place.shape, dtype=place.dtype, device="cpu")
                    block = bytes_of(tensor)
                except RuntimeError as error:  # no such shape, or no memory
                    raise LoRAFileError(f"'{self.name}' cannot be read ({shown(str(error))})") from error
                self._fill(block)
                if pool is not None and self._digest is not None:  # beside the reading: both let other threads go on
                    hashed.append(pool.submit(self._digest.update, block))
                elif self._digest is not None:
                    self._digest.update(block)
                yield key, tensor
            for done in hashed:
                done.result()

    def tensor(self, key: str) -> Tensor:
        """One tensor alone, as of `tensors`; not where they are read for their hash. Raises LoRAFileError, OSError."""
        place = self.places[key]
        tensor = torch.empty(place.shape, dtype=place.dtype, device="cpu")
        self._file.seek(self._numbers + place.start)
        self._fill(bytes_of(tensor))
        return tensor

    def _bytes(self, count: int) -> bytearray:
        block = bytearray(count)
        self._fill(memoryview(block))
        if self._digest is not None:
            self._digest.update(block)
        return block

    def _fill(self, block: memoryview) -> None:
        while block:
            count = self._file.readinto(block)
            if not count:
                raise LoRAFileError(
                    f"'{self.name}' has become shorter while it was read; wait until it is written whole, then queue "
                    "again"
                )
            block = block[count:]


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


def _metadata(entry: object) -> dict[str, str]:
    """Raises ValueError for what is no table of texts."""
    table = {} if entry is None else entry
    if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
        raise ValueError("metadata are texts by name")
    return table


def _place(name: str, key: str, entry: Mapping[str, Any]) -> Place:
    """Raises TypeError, KeyError or ValueError for what is no place, LoRAFileError for numbers of another kind."""
    shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, start, end)) or len(shape) > _MOST_AXES:
        raise ValueError("sizes and offsets are whole numbers")
    dtype = DTYPES.get(entry["dtype"])
    if dtype is None:
        raise _unsupported(name, key, shown(str(entry["dtype"]), 20))
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError("a tensor has other bytes than its shape")
    return Place(dtype, shape, start, end)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, without a copy."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


@contextlib.contextmanager
def opened(
    path: str | os.PathLike[str], digest: hashlib._Hash | None = None, instead: str = "choose another file"
) -> Iterator[OpenFile]:
    """Open a safetensors file and check its header: a few milliseconds, nothing allocated for its numbers.

    instead: what to do where there is no file. Raises LoRAFileError for a file that is missing, cut off or no
    safetensors file, and for whatever goes wrong while it is open: a disk that fails, a file that becomes shorter.
    """
    path = Path(path)
    name = shown(path.name, 255)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
            raise FileNotFoundError
        with open(path, "rb", buffering=0) as file:
            yield OpenFile(name, file, digest)
    except LoRAFileError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise LoRAFileError(f"'{name}' is missing; {instead}") from error
    except OSError as error:
        raise LoRAFileError(
            f"'{name}' cannot be read ({shown(error.strerror or str(error))}); see that its disk is there and that "
            "you may read it, then queue again"
        ) from error


def check_lora_file(path: str | os.PathLike[str]) -> list[str]:
    """Refuse early what cannot be a LoRA, from the header alone: a few milliseconds, nothing allocated.

    Returns the tensors' names. Raises LoRAFileError for a missing, truncated or non-safetensors file, or one without
    any LoRA key.
    """
    with _opened_lora(path) as file:
        return list(file.places)


def unread(name: str, kind: str, key: str) -> str:
    """A sentence on a file with a kind of update that is not read, as a tensor of it shows."""
    return (
        f"'{name}' holds {kind} (tensor '{shown(key)}'), which neither ComfyUI nor this pack reads; train a LoRA, LoHa "
        "or LoKr, or merge it with its own library and extract a LoRA"
    )


@contextlib.contextmanager
def _opened_lora(path: str | os.PathLike[str], digest: hashlib._Hash | None = None) -> Iterator[OpenFile]:
    with opened(path, digest, "put it into the loras folder or choose another file") as file:
        if not any(formats.is_lora_name(name) for name in file.places):
            kind = formats.unread_kind(file.places)
            if kind is not None:
                raise LoRAFileError(unread(file.name, *kind))
            examples = ", ".join(map(shown, sorted(file.places)[:2])) or "it is empty"
            raise LoRAFileError(
                f"'{file.name}' holds no LoRA: none of its {len(file.places)} tensors has a LoRA name "
                f"({examples}); choose a LoRA file, not a checkpoint or embedding"
            )
        yield file


def all_finite(tensor: Tensor) -> bool:
    """In one pass over a tensor of any floating type: its least and greatest number say it, and NaN is both."""
    if tensor.numel() == 0:
        return True
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # float8 has no order
    low, high = torch.aminmax(wide)
    return math.isfinite(low.item()) and math.isfinite(high.item())


_NUMBERS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


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
        raise _unsupported(name, key, str(tensor.dtype).removeprefix("torch."))
    if tensor.is_floating_point() and not all_finite(tensor):
        raise LoRAFileError(
            f"'{name}' holds NaN or infinite numbers (tensor '{shown(key)}'): its training diverged; "
            "use another epoch or file"
        )


def _unsupported(name: str, key: str, kind: str) -> LoRAFileError:
    return LoRAFileError(
        f"'{name}' holds {kind} (tensor '{shown(key)}'), which is not supported; save it as fp32, fp16 or bf16"
    )


def _check_together(name: str, tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if key.endswith(".alpha") and tensor.numel() != 1:
            raise LoRAFileError(
                f"'{name}' is broken: '{shown(key)}' has shape {tuple(tensor.shape)}, expected one number; "
                "download it again"
            )
        for endings in formats.TOGETHER:
            stem = next((key.removesuffix(ending) for ending in endings if key.endswith(ending)), None)
            missing = [] if stem is None else [e for e in endings if f"{stem}{e}" not in tensors]
            if missing:
                raise LoRAFileError(
                    f"'{name}' is broken: it has '{shown(key)}' without a '{missing[0]}' beside it; download it again"
                )


def read_lora_file(path: str | os.PathLike[str], digest: hashlib._Hash | None = None) -> dict[str, Tensor]:
    """All tensors of a LoRA file on the CPU, in the file's dtypes, read and checked in one pass.

    digest: updated with every byte of the file. Raises LoRAFileError as `check_lora_file` and `check_tensors` do.
    """
    tensors: dict[str, Tensor] = {}
    with _opened_lora(path, digest) as file:
        for name, tensors[name] in file.tensors():
            _check_numbers(file.name, name, tensors[name])  # at once: while the processor still has it
    _check_together(file.name, tensors)
    return tensors


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """What a file says of itself. Raises LoRAFileError for what is no safetensors file."""
    with opened(path) as file:
        return file.metadata


def sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
