"""Versions of files, and their hashes: each computed once, and kept when the host starts again."""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import folder_paths

from ....ziplora_core.files import LoRAFileError, sha256, shown
from ....ziplora_core.writing import atomic_write

_FORMAT = 1
_MOST = 4096  # files that are remembered, the last ones
_LARGEST = 8 * 2**20  # characters of the file that is kept: more is not ours
_SETTLED = 3.0  # seconds: a younger file may change again without another time, where a file system's are coarse


class Version(NamedTuple):
    """Other numbers are another version of a file. `cp -p` of another one keeps size and modification time, and gives
    a new time of change; so do `chmod`, a link and a new name, which `Hashes.version` tells from it. Times are in
    nanoseconds."""

    path: str
    size: int
    modified: int
    changed: int


class Key(NamedTuple):
    """A version, and which file of its disk it is: two that were moved into each other's place may differ in nothing
    else. (No part of `Version`: some network disks number their files anew, and that must not zip a pair again.)"""

    path: str
    size: int
    modified: int
    changed: int
    inode: int


def _looked_at(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except FileNotFoundError as error:
        raise LoRAFileError(f"'{shown(os.path.basename(path), 255)}' is missing; choose another file") from error
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: Exception) -> LoRAFileError:
    return LoRAFileError(
        f"'{shown(os.path.basename(path), 255)}' cannot be read ({shown(str(error))}); see that its disk is there"
    )


def is_one_file(one: str, other: str) -> bool:
    """Whether two paths lead to one file. Raises LoRAFileError where one leads to none.

    Some disks number no files, or give all the number 0, as cloud storage on Windows does: there the paths tell.
    """
    here, there = _looked_at(one), _looked_at(other)
    if here.st_ino and there.st_ino:
        return os.path.samestat(here, there)
    return _resolved(one) == _resolved(other)


def _resolved(path: str) -> str:
    return os.path.normcase(os.path.realpath(path))


def version(path: str) -> Version:
    """Of a file as it is now, from its entry in the file system alone. Raises LoRAFileError where there is none."""
    status = _looked_at(path)
    return Version(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def key(path: str) -> Key:
    """Raises LoRAFileError where there is no such file."""
    status = _looked_at(path)
    return Key(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


class Hashes:
    """SHA-256 by version, in memory and in a file that any number of processes share.

    The file is a convenience: where it is damaged, not ours or cannot be written, hashes are computed again.
    """

    def __init__(self, kept: Callable[[], str]) -> None:
        """kept: the file's path, asked each time, as the host may be told of another folder."""
        self._kept = kept
        self._known: dict[Key, str] | None = None
        self._lock = threading.Lock()

    def of(self, path: str) -> str:
        """A file's hash, which is read where it is not known. Raises OSError, LoRAFileError."""
        before = key(path)
        digest = self.known(before)
        if digest is None:
            digest = sha256(path)
            if key(path) == before:
                self.remember(before, digest)
        return digest

    def checked(self, path: str) -> str:
        """As `of`, but raises LoRAFileError also where the file cannot be read."""
        try:
            return self.of(path)
        except OSError as error:
            raise _unreadable(path, error) from error

    def version(self, path: str) -> Version:
        """Of a file as it is now, the same for the same bytes at the same size and modification time.

        From its entry in the file system alone; read is a file of which a version is known that differs in nothing but
        its time of change, or its number. Raises LoRAFileError.
        """
        now = key(path)
        alike = self._alike(now)
        digest = alike.get(now) or (self.checked(path) if alike else None)
        return Version(*now[:3], min([now.changed, *(k.changed for k, known in alike.items() if known == digest)]))

    def _alike(self, file: Key) -> dict[Key, str]:
        with self._lock:
            if self._known is None:
                self._known = self._read()
            return {known: digest for known, digest in self._known.items() if known[:3] == file[:3]}

    def known(self, file: Key) -> str | None:
        with self._lock:
            if self._known is None:
                self._known = self._read()
            return self._known.get(file)

    def remember(self, file: Key, digest: str) -> None:
        """Unless the file is too young for its times to tell it from what it may become next."""
        if abs(time.time() - max(file.modified, file.changed) / 1e9) < _SETTLED:
            return
        with self._lock:
            together = {**self._read(), **(self._known or {})}  # another process may have added some
            together.pop(file, None)
            self._known = dict(list({**together, file: digest}.items())[-_MOST:])
            self._write(self._known)

    def _read(self) -> dict[Key, str]:
        """What the file holds, entries that cannot be right left out."""
        try:
            with open(self._kept(), encoding="utf-8") as file:
                table = json.loads(file.read(_LARGEST))
            entries = table["files"] if table["format"] == _FORMAT else []
            return {Key(*entry[:5]): entry[5] for entry in entries if _is_right(entry)}
        except (OSError, ValueError, TypeError, LookupError, RecursionError):
            return {}

    def _write(self, known: dict[Key, str]) -> None:
        text = json.dumps({"format": _FORMAT, "files": [[*of, digest] for of, digest in known.items()]})
        try:
            with atomic_write(self._kept()) as file:
                file.write(text.encode())
        except OSError as error:
            logging.debug("ZipLoRA: hashes of files could not be kept: %s", error)


def _is_right(entry: object) -> bool:
    return (
        isinstance(entry, list)
        and [type(value) for value in entry] == [str, int, int, int, int, str]
        and re.fullmatch("[0-9a-f]{64}", entry[5]) is not None
    )


HASHES = Hashes(lambda: os.path.join(folder_paths.get_user_directory(), "ziplora_hashes.json"))
