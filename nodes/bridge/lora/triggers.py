"""What LoRA files in the host's loras folders, and the files beside them, say of their use."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import folder_paths

from ....ziplora_core import triggers
from ....ziplora_core.files import LoRAFileError, read_metadata, shown
from ....ziplora_core.tag_counts import parsed
from ....ziplora_core.triggers import Triggers
from . import beside

__all__ = ["Triggers", "of_file"]

_LARGEST_HEADER = 16 * 2**20  # bytes: a LoRA's own takes one, tag counts of a large training some more
_LARGEST_TABLE = 4 * 2**20  # bytes of a JSON file beside it
_LARGEST_TEXT = 64 * 2**10  # bytes of a text beside it

# What stands in place of, or behind, the ending of a LoRA's name, in the order in which they count: what users write
# in AUTOMATIC1111's page or by hand, then what managers keep and users edit there, then what was downloaded.
_BESIDE = (
    ".json",  # AUTOMATIC1111, Forge
    ".txt",
    ".metadata.json",  # LoRA Manager
    ".rgthree-info.json",
    ".civitai.info",  # Civitai Helper
    ".cm-info.json",  # Stability Matrix
    ".cminfo.json",  # Civicomfy
)
_CARD = "README.md"  # of a repository with one LoRA, as diffusers' scripts write it
_PICTURES = tuple(f"{way}.{kind}" for way in (".preview", "") for kind in ("png", "jpg", "jpeg", "webp"))


def of_file(name: str) -> Triggers:
    """What a file in the host's loras folders says of its use, from its header and the files beside it alone.

    name: as the host lists it; nothing else is looked at, so no path leads out of the folders, and of files beside it
    none that is a link to a place outside. Never raises: nothing is known of what is not there or cannot be read, and
    notes say why.
    """
    path = _listed(name)
    if path is None:
        return Triggers(notes=(f"'{shown(str(name))}' is not among the LoRA files",), listed=False)
    notes: list[str] = []
    found = triggers.known(_header(path, notes), dict(_beside(path, notes)))
    return replace(found, thumbnail=_thumbnail(path), notes=tuple(notes))


def _listed(name: str) -> str | None:
    try:
        if not isinstance(name, str) or name not in folder_paths.get_filename_list("loras"):
            return None
        return folder_paths.get_full_path("loras", name)
    except OSError:
        return None


def _header(path: str, notes: list[str]) -> dict[str, str]:
    title = shown(os.path.basename(path), 255)
    try:
        with open(path, "rb") as file:
            start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if _LARGEST_HEADER < length <= os.path.getsize(path):
            notes.append(f"'{title}' has a header of {length:,} bytes, which is not read for trigger words")
            return {}
        return read_metadata(path)
    except LoRAFileError as error:
        notes.append(str(error))
    except OSError as error:
        notes.append(f"'{title}' cannot be read ({shown(error.strerror or str(error))})")
    return {}


def _beside(path: str, notes: list[str]) -> Iterator[tuple[str, Any]]:
    """(kind of file, its text or parsed JSON) of what lies beside a LoRA and can be read."""
    for ending in _BESIDE:
        for place in (os.path.splitext(path)[0] + ending, path + ending):
            text = beside.text(place, path, _LARGEST_TEXT if ending == ".txt" else _LARGEST_TABLE, notes)
            if text is None:
                continue
            found = text if ending == ".txt" else parsed(text)
            if ending == ".txt" and (len(text.strip()) > triggers.LONGEST or triggers.is_prose(text)):
                notes.append(f"'{beside.title(place)}' is long or holds sentences, not trigger words; it is ignored")
            elif not isinstance(found, dict | str):
                notes.append(f"'{beside.title(place)}' is no JSON table; it is ignored")
            else:
                yield ending[1:], found
            break
    if beside.alone(path):
        text = beside.text(os.path.join(os.path.dirname(path), _CARD), path, _LARGEST_TEXT, notes)
        if text is not None:
            yield _CARD, triggers.front_matter(text)


def _thumbnail(path: str) -> str | None:
    stem = os.path.splitext(path)[0]
    places = (stem + ending for ending in _PICTURES)
    return next((place for place in places if os.path.isfile(place) and beside.stays(place, path)), None)
