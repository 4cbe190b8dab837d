"""A folder that one client at a time writes to, and files that are whole on the disk before anything says so."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import BatchError

if os.name == "nt":
    import msvcrt

    def _lock(file: int) -> None:
        os.lseek(file, 1 << 20, os.SEEK_SET)  # beyond the text, which a second client reads
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
else:
    import fcntl

    def _lock(file: int) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


_LOCK = ".lock"


class Lock:
    """Held until it is closed, or the process ends, in whatever way."""

    def __init__(self, folder: Path):
        """Raises BatchError where another client has the folder, or where it cannot be locked."""
        path = folder / _LOCK
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(self._file)
        except OSError as error:
            holder = os.read(self._file, 200).decode("utf-8", "replace").strip()
            os.close(self._file)
            if isinstance(error, BlockingIOError | PermissionError):
                raise BatchError(
                    f"another client ({holder or 'unknown'}) is working with the results folder {folder}; "
                    "wait until it has ended, or give another --results"
                ) from error
            raise BatchError(
                f"the results folder {folder} cannot be locked ({error}), so that two clients could spoil it; "
                "give a --results on another disk"
            ) from error
        os.ftruncate(self._file, 0)
        os.lseek(self._file, 0, os.SEEK_SET)
        os.write(self._file, f"process {os.getpid()} on {socket.gethostname()}".encode())

    def close(self) -> None:
        os.close(self._file)


@contextlib.contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which is at `path` whole and on the disk after the block, or not at all."""
    make(path.parent)
    partial = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def tidy(folder: Path) -> None:
    """Remove what a client that died was still writing: hold the lock. A folder below with a lock of its own is another
    client's, which may be writing."""
    _tidy(folder)
    for below, folders, names in os.walk(folder / "files"):
        if _LOCK in names:
            folders.clear()
        else:
            _tidy(Path(below))


def _tidy(folder: Path) -> None:
    for path in folder.glob(".*.part"):
        if re.fullmatch(r"\.[0-9a-f]{32}\.part", path.name):
            path.unlink(missing_ok=True)


def make(folder: Path) -> None:
    """A folder with all above it, each of them on the disk."""
    if not folder.is_dir():
        make(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def sync(folder: Path) -> None:
    """Put a folder's list of names onto the disk; Windows does so itself."""
    if os.name != "nt":
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def sha256(path: Path) -> str:
    """Of a file's contents."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def holds(path: Path, size: int | None, digest: str | None) -> bool:
    """Whether a file is there as it was written; where nothing is known of it, whether it is there and not empty."""
    try:
        found = path.stat().st_size
        return found > 0 and size in (None, found) and (digest is None or sha256(path) == digest)
    except OSError:
        return False
