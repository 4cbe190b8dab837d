"""Files that say how they were made: what they carry, and what they hold. They may come from anybody."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import BatchError
from .jobs import Prompt, parse_workflow

_LONGEST_HEADER = 100 * 1024 * 1024  # bytes: safetensors' own limit


def workflow(file: Path) -> Prompt:
    """The workflow in API form that a file carries. Raises BatchError, with what is wrong with the file."""
    said = metadata(file).get("prompt")
    if not isinstance(said, str):
        raise BatchError(f"{file} carries no workflow: it was written with --disable-metadata, or by other means")
    return parse_workflow(said, f"the workflow in {file}")


def metadata(file: Path) -> dict[str, Any]:
    """Raises BatchError."""
    if not file.exists():
        raise BatchError(f"{file} is missing")
    if not file.is_file():
        raise BatchError(f"{file} is no file; name a .png or a .safetensors")
    if kind(file) == ".safetensors":
        return Tensors.read(file, numbers=False).metadata
    if kind(file) == ".png":
        return dict(image(file).info)
    raise BatchError(f"{file} is neither a .png nor a .safetensors")


def kind(file: Path) -> str:
    return file.suffix.lower()


def image(file: Path) -> Any:
    """A PNG, whole. Raises BatchError."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file, formats=["PNG"]) as opened:  # of other formats some are handed to other programs
            opened.load()
            return opened
    except UnidentifiedImageError as error:
        raise BatchError(f"{file} cannot be read as a PNG: it is empty, broken, or of another kind") from error
    except Exception as error:  # a decoder of a broken file raises whatever it meets
        raise BatchError(f"{file} cannot be read as a PNG: {error or type(error).__name__}") from error


@dataclass(frozen=True)
class Tensors:
    """A safetensors file. entries: name -> (dtype, shape, start, end). numbers: all of them, or none."""

    metadata: dict[str, Any]
    entries: dict[str, tuple[str, list[int], int, int]]
    numbers: bytes = b""

    @classmethod
    def read(cls, path: Path, numbers: bool = True) -> Tensors:
        """Raises BatchError for what is no whole safetensors file."""
        try:
            with path.open("rb") as file:
                start = file.read(8)
                length, size = int.from_bytes(start, "little"), path.stat().st_size
                if len(start) < 8 or length > min(size - 8, _LONGEST_HEADER):
                    raise ValueError("it is empty, cut off, or of another kind")
                header = json.loads(file.read(length))
                about = header.pop("__metadata__", None) or {}
                entries = {name: _entry(value, size - 8 - length) for name, value in header.items()}
                return cls(dict(about), entries, file.read() if numbers else b"")
        except OSError as error:
            raise BatchError(f"{path} cannot be read: {error.strerror or error}") from error
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise BatchError(f"{path} is no whole safetensors file: {error}") from error

    def tensor(self, name: str) -> tuple[Any, ...] | None:
        """What two files must have alike."""
        if name not in self.entries:
            return None
        dtype, shape, start, end = self.entries[name]
        return dtype, shape, self.numbers[start:end]

    def about(self) -> dict[str, Any]:
        """What this pack says of inputs and versions in a file."""
        found: dict[str, Any] = {}
        for key in ("ziplora", "ziplora_pair"):
            try:
                found |= json.loads(self.metadata.get(key, "{}"))
            except (ValueError, TypeError, RecursionError):
                continue
        return found


def _entry(value: Any, size: int) -> tuple[str, list[int], int, int]:
    start, end = value["data_offsets"]
    if not (isinstance(start, int) and isinstance(end, int) and 0 <= start <= end <= size):
        raise ValueError("its numbers are not all there")
    return str(value["dtype"]), list(value["shape"]), start, end
