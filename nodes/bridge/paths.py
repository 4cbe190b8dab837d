"""Where files go: numbered names in the host's folders."""

from __future__ import annotations

import os

import folder_paths

from ...ziplora_core.files import whole_or_not_at_all


def next_path(prefix: str, folder: str, suffix: str) -> str:
    """The next free numbered file of a prefix in a folder of the host's, as its own save nodes number them.

    Raises ValueError for a prefix that leads out of the folder, OSError where there can be no such folder.
    """
    try:
        directory, name, counter, *_ = folder_paths.get_save_image_path(prefix, folder)
    except OSError as error:
        raise OSError(
            f"filename_prefix '{prefix}' needs a folder in '{os.path.basename(folder)}' that cannot be used "
            f"({error.strerror or error}); see that it is a folder and writable, or choose another prefix"
        ) from error
    except Exception as error:  # the host raises this bare
        raise ValueError(f"filename_prefix '{prefix}' leads out of the folder '{os.path.basename(folder)}'") from error
    if not name or name in (".", ".."):
        raise ValueError(f"filename_prefix '{prefix}' names no file")
    return os.path.join(directory, f"{name}_{counter:05}_{suffix}")


def write_output(prefix: str, suffix: str, text: str) -> str:
    """Write a numbered text file below the output folder, whole or not at all; its name. Raises ValueError, OSError."""
    folder = folder_paths.get_output_directory()
    path = next_path(prefix, folder, suffix)
    with whole_or_not_at_all(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
    return os.path.relpath(path, folder)
