"""Files: written whole or not at all, under names that nobody else has."""

from __future__ import annotations

import atexit
import contextlib
import errno
import json
import logging
import os
import secrets
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from .files import DTYPES, bytes_of

_UNFINISHED = ".ziplora.part"  # ends the name of a file that is being written; no loader lists it
_ABANDONED = 3600.0  # seconds
_FORGOTTEN = 7 * 86400.0  # seconds: an empty one is a name that is reserved, by a training of days perhaps
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CANNOT_BE_SYNCED = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM)


@dataclass(frozen=True)
class _Reserved:
    """The parts of a reserved name, and the empty file beside it that says so."""

    stem: str
    number: int
    ending: str
    marker: Path


_reserved: dict[Path, _Reserved] = {}  # names that this process has


def reserve(folder: str | os.PathLike[str], stem: str, number: int, ending: str) -> Path:
    """The first free one of `stem_00001_ending`, `stem_00002_ending`, …, from a number on; nothing is there yet.

    Beside it is an empty file: whoever makes that has the name, on this machine or on another one with the same folder,
    until `atomic_write` has written there, and no loader lists it, whatever becomes of its writer.
    Raises OSError where the folder is missing, read-only or full.
    """
    while True:
        path = Path(folder, f"{stem}_{number:05}_{ending}")
        marker = path.with_name(f".{path.name}{_UNFINISHED}")
        with _named(path), contextlib.suppress(FileExistsError):
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            if not os.path.lexists(path):  # looked at after: who has just finished it has the name
                _reserved[path] = _Reserved(stem, number, ending, marker)
                return path
            os.unlink(marker)
        number += 1


def give_back(path: str | os.PathLike[str]) -> None:
    """Let others have a name that was reserved here; nothing where it has been written to."""
    reserved = _reserved.pop(Path(path), None)
    if reserved is not None:
        with contextlib.suppress(OSError):
            os.unlink(reserved.marker)


@atexit.register
def _give_all_back() -> None:
    """Of work that the process's end cut short."""
    for path in list(_reserved):
        give_back(path)


@dataclass
class AtomicFile:
    """A file that is being written. path: where it is, once it is whole."""

    path: Path
    _file: BinaryIO

    def write(self, part: bytes | bytearray | memoryview) -> int:
        return self._file.write(part)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[AtomicFile]:
    """A file beside `path` to write to; synced, and named `path` after the block, unless it raised.

    It replaces what is there, except under a name that was reserved: a file that somebody who reserves nothing has put
    there meanwhile stays, and this one has the next free number (`AtomicFile.path`), which the log says.

    Raises OSError where the folder is missing, read-only or full; nothing is left behind then, and a reserved name
    stays reserved. What a process that was killed has left there is cleared away.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}{_UNFINISHED}")
    with _named(path):
        # With the permissions of any new file: the mask need not be asked for, which only setting it does.
        handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0), 0o666)
        try:
            with open(handle, "wb") as file:
                os.utime(temporary)  # now, by the clock of the folder's file system
                _clear(path.parent, os.fstat(handle).st_mtime)
                written = AtomicFile(path, file)
                yield written
                file.flush()
                os.fsync(handle)
            if path in _reserved:
                written.path = _under_a_free_name(temporary, path)
                give_back(path)
            else:
                os.replace(temporary, path)
            _sync(path.parent)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


def _under_a_free_name(temporary: Path, path: Path) -> Path:
    """A finished file under its reserved name, or the next number where that is another file's by now."""
    tried = path
    try:
        while True:
            try:
                _name_anew(temporary, tried)
            except FileExistsError:
                name, taken = _reserved[tried], tried
                tried = reserve(path.parent, name.stem, name.number + 1, name.ending)
                if taken != path:  # which stays reserved until this is done: it may be tried again
                    give_back(taken)
                logging.warning(
                    "ZipLoRA: another program has written '%s' meanwhile, which stays; this file is '%s'.",
                    taken.name,
                    tried.name,
                )
            else:
                return tried
    finally:
        if tried != path:
            give_back(tried)


def _name_anew(temporary: Path, path: Path) -> None:
    """Raises FileExistsError where the name is taken; whoever has it keeps it."""
    if os.name == "nt":  # where renaming itself refuses
        os.rename(temporary, path)
        return
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # of a file system without links
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            os.replace(temporary, path)
        except BaseException:
            os.unlink(path)
            raise


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write a safetensors file, whole or not at all, one tensor after the other and without a copy of them all.

    (The library's own writer uses names of its own, which nobody clears away, or needs the memory twice.)
    Returns where it is, and raises OSError, as `atomic_write` does.
    """
    with atomic_write(path) as file:
        order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))  # each at a multiple of its size
        table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for key in order:
            tensor, start = tensors[key], end
            end += tensor.numel() * tensor.element_size()
            table[key] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        header = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
        header += b" " * (-len(header) % 8)
        file.write(struct.pack("<Q", len(header)) + header)
        for key in order:
            file.write(bytes_of(tensors[key].detach().cpu().contiguous()))
    return file.path


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


def _clear(folder: Path, now: float) -> None:
    """Delete what was begun here long ago and never finished: its writer is gone.

    now: by the clock of the folder's file system, which need not be this machine's.
    """
    for left in folder.glob(f".*{_UNFINISHED}"):
        with contextlib.suppress(OSError):
            status = left.stat()
            if now - status.st_mtime > (_ABANDONED if status.st_size else _FORGOTTEN):
                left.unlink()


def _sync(folder: Path) -> None:
    """The new name too, where a file system knows such a thing."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows has no such call
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _CANNOT_BE_SYNCED:
            raise
    finally:
        os.close(handle)
