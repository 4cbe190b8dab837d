"""Where files go: numbered names in the host's folders, each of which one writer has for itself."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from contextvars import ContextVar

import folder_paths

from ....ziplora_core.files import shown
from ....ziplora_core.writing import atomic_write, give_back
from ....ziplora_core.writing import reserve as reserve_number

_NO_NAME = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_LONGEST = 200  # bytes: a file system takes 255 for a name, with its number and its ending

_mine: ContextVar[list[str] | None] = ContextVar("names reserved by one piece of work", default=None)


def reserve(prefix: str, folder: str, suffix: str) -> str:
    """The next free numbered file of a prefix in a folder of the host's, as its own save nodes number them.

    Nobody else gets the same until it is written or given back: `names_given_back`, around the work, gives back the
    names that nothing was written to. Raises ValueError for a prefix that leads out of the folder or that no file can
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
    mine = _mine.get()
    if mine is not None:
        mine.append(path)
    return path


@contextlib.contextmanager
def names_given_back() -> Iterator[None]:
    """Work that may reserve names, as a block or a decorator: those that it has not written to are free afterwards,
    however it ends."""
    mine: list[str] = []
    outer = _mine.set(mine)
    try:
        yield
    finally:
        _mine.reset(outer)
        for path in mine:
            give_back(path)


@names_given_back()
def write_output(prefix: str, suffix: str, text: str) -> str:
    """Write a numbered text file below the output folder, whole or not at all; its name. Raises ValueError, OSError."""
    folder = folder_paths.get_output_directory()
    path = reserve(prefix, folder, suffix)
    with atomic_write(path) as file:
        file.write(text.encode(errors="backslashreplace"))
    return os.path.relpath(file.path, folder)
