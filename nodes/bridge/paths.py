"""Where files go: numbered names in the host's folders, each of which one writer has for itself."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
from collections.abc import Iterator
from contextvars import ContextVar

import folder_paths

from ...ziplora_core.files import shown
from ...ziplora_core.writing import reserve as reserve_number
from ...ziplora_core.writing import whole_or_not_at_all

_NO_NAME = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_LONGEST = 200  # bytes: a file system takes 255 for a name, with its number and its ending

Reserved = dict[str, tuple[int, int]]  # path -> the empty file's device and number
_unwritten: Reserved = {}
_mine: ContextVar[Reserved] = ContextVar("names reserved by one piece of work")


def reserve(prefix: str, folder: str, suffix: str) -> str:
    """The next free numbered file of a prefix in a folder of the host's, as its own save nodes number them.

    It is there at once, empty, so that nobody else gets the same; `names_given_back`, around the work, takes it away
    again where nothing was written. Raises ValueError for a prefix that leads out of the folder or that no file can
    have, OSError where nothing can be written there.
    """
    said = f"filename_prefix '{shown(prefix)}'"
    if _NO_NAME.search(prefix):
        raise ValueError(f"{said} holds characters that no file name has; write letters, digits and /")
    if len(prefix.encode()) > _LONGEST:
        raise ValueError(f"{said} is {len(prefix.encode())} bytes long; expected {_LONGEST} at most")
    try:
        directory, name, counter, *_ = folder_paths.get_save_image_path(prefix, folder)
    except OSError as error:
        raise OSError(
            f"{said} needs a folder in '{os.path.basename(folder)}' that cannot be used "
            f"({error.strerror or error}); see that it is a folder and writable, or choose another prefix"
        ) from error
    except Exception as error:  # the host raises this bare
        raise ValueError(f"{said} leads out of the folder '{os.path.basename(folder)}'") from error
    if not name or name in (".", ".."):
        raise ValueError(f"{said} names no file")
    path = str(reserve_number(directory, name, counter, suffix))
    status = os.stat(path)
    _mine.get(_unwritten)[path] = _unwritten[path] = (status.st_dev, status.st_ino)
    return path


@contextlib.contextmanager
def names_given_back() -> Iterator[None]:
    """Work that may reserve names, as a block or a decorator: those that it has not written to are free afterwards,
    however it ends."""
    mine: Reserved = {}
    outer = _mine.set(mine)
    try:
        yield
    finally:
        _mine.reset(outer)
        for path in mine:
            _give_back(path)


def _give_back(path: str) -> None:
    """Delete a file if it is the empty one that was made here."""
    reserved = _unwritten.pop(path, None)
    with contextlib.suppress(OSError):
        status = os.stat(path)
        if status.st_size == 0 and (status.st_dev, status.st_ino) == reserved:
            os.unlink(path)


@atexit.register
def _give_all_back() -> None:
    """Of work that the host's end cut short."""
    for path in list(_unwritten):
        _give_back(path)


@names_given_back()
def write_output(prefix: str, suffix: str, text: str) -> str:
    """Write a numbered text file below the output folder, whole or not at all; its name. Raises ValueError, OSError."""
    folder = folder_paths.get_output_directory()
    path = reserve(prefix, folder, suffix)
    with whole_or_not_at_all(path) as file:
        file.write(text.encode(errors="backslashreplace"))
    return os.path.relpath(path, folder)
