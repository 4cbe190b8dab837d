"""Files beside a LoRA file, read with care: they may be anything."""

from __future__ import annotations

import os
import stat

import folder_paths

from ....ziplora_core.files import shown


def text(place: str, path: str, most: int, notes: list[str]) -> str | None:
    """A file beside a LoRA, whole; None where there is none, or it is refused with a note."""
    try:
        status = os.stat(place)
    except (OSError, ValueError):
        return None
    why = None
    if not stat.S_ISREG(status.st_mode) or not stays(place, path):
        why = "is no file in the LoRA's folder"
    elif status.st_size > most:
        why = f"is too large ({status.st_size:,} bytes, {most:,} at most)"
    else:
        try:
            with open(place, "rb") as file:
                return file.read(most).decode("utf-8-sig")
        except UnicodeDecodeError:
            why = "is no text in UTF-8"
        except OSError as error:
            why = f"cannot be read ({shown(error.strerror or str(error))})"
    notes.append(f"'{title(place)}' {why}; it is ignored")
    return None


def title(place: str) -> str:
    return shown(os.path.basename(place), 255)


def stays(place: str, path: str) -> bool:
    """Whether a file beside a LoRA is one there, or in a loras folder, and no link to somewhere else."""
    own = os.path.realpath(place)
    folders = [os.path.dirname(path), *folder_paths.get_folder_paths("loras")]
    return any(own.startswith(os.path.realpath(folder).rstrip(os.sep) + os.sep) for folder in folders)


def alone(path: str) -> bool:
    """Whether a LoRA has a folder to itself, so that a model card there is its own."""
    folder = os.path.dirname(path)
    if any(os.path.realpath(folder) == os.path.realpath(root) for root in folder_paths.get_folder_paths("loras")):
        return False
    try:
        with os.scandir(folder) as entries:
            return sum(entry.name.endswith(".safetensors") for entry in entries) == 1
    except OSError:
        return False
