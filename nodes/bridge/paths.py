"""Where files go: numbered names in the host's folders."""

from __future__ import annotations

import os
import re

import folder_paths

from ...ziplora_core.files import shown, whole_or_not_at_all

_NO_NAME = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_LONGEST = 200  # bytes: a file system takes 255 for a name, with its number and its ending


def next_path(prefix: str, folder: str, suffix: str) -> str:
    """The next free numbered file of a prefix in a folder of the host's, as its own save nodes number them.

    Raises ValueError for a prefix that leads out of the folder or that no file can have, OSError where there can be no
    such folder.
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
    return os.path.join(directory, f"{name}_{counter:05}_{suffix}")


def write_output(prefix: str, suffix: str, text: str) -> str:
    """Write a numbered text file below the output folder, whole or not at all; its name. Raises ValueError, OSError."""
    folder = folder_paths.get_output_directory()
    path = next_path(prefix, folder, suffix)
    with whole_or_not_at_all(path) as temporary, open(temporary, "wb") as file:
        file.write(text.encode(errors="backslashreplace"))
    return os.path.relpath(path, folder)
