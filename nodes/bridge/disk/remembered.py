"""Zips that were made before, found again by the content of everything that they were made of."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import folder_paths
import torch
from PIL import Image
from torch import Tensor

from ....ziplora_core import routing, saved
from ....ziplora_core.files import LoRAFileError, read_metadata
from ..lora.described import DETAILS
from ..lora.fitting import FittedSet
from ..lora.loras import LoRASource, LoRASources
from ..lora.zipped import ZippedLoRA
from . import content
from .provenance import versions

FOLDER = "ziplora_zips"  # in the host's user folder, which restarts leave alone
MOST = 200  # files
_MEGABYTES = 1000  # where ZIPLORA_REMEMBER_MB says nothing
_KEY = "ziplora_remembered"  # in a file's metadata: what a zip leaves beside its coefficients, as JSON
_OF_OTHER_HOSTS = (AttributeError, LookupError, TypeError, ValueError)  # whose models are kept in another way
_DAMAGED = (LoRAFileError, OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError)


@dataclass(frozen=True)
class Remembered:
    """What ZipLoRA Optimize gives and shows. words, picture: what stays on the node. drawn: IMAGE of its references."""

    zipped: ZippedLoRA
    loss_map: dict[str, list[float]]
    words: str
    picture: Image.Image | None = None
    drawn: Tensor | None = None


def folder() -> str:
    return os.path.join(folder_paths.get_user_directory(), FOLDER)


def most_bytes() -> float:
    """Of all files together. 0: nothing is remembered."""
    try:
        return float(os.environ.get("ZIPLORA_REMEMBER_MB", _MEGABYTES)) * 1e6
    except ValueError:
        return _MEGABYTES * 1e6


def key(model, sources: LoRASources, **given: Any) -> str | None:
    """A hash of all that a zip depends on; None where nothing is to be remembered, or where content does not tell it.

    model: ModelPatcher, unchanged. given: what else there is: conditioning, latents, settings. The first zip on a model
    reads all of its weights. Interrupts pass through.
    """
    if not most_bytes() > 0:
        return None
    try:
        loras = {concept: [*_identity(source), source.clip_strength] for concept, source in sources.by_concept.items()}
        told = [list(sources.by_concept), sources.warnings, sources.own_text_encoders]
        return content.digest([versions(), content.of_code(), loras, told, content.of_model(model), given])
    except (content.UnknownContent, OSError, RuntimeError, *_OF_OTHER_HOSTS) as reason:
        logging.info("ZipLoRA: this zip is not remembered on disk: it depends on %s.", reason)
        return None


def _identity(source: LoRASource) -> tuple[str, str, int, float]:
    """Name, hash, size and strength of a LoRA; of one that comes from no file, of its tensors."""
    sha256 = source.sha256 or content.digest(source.tensors)
    return source.name, sha256, source.version.size if source.version else 0, source.strength


def _path(made_of: str) -> str:
    return os.path.join(folder(), f"{made_of[:20]}.safetensors")


def keep(made_of: str | None, zip_: Remembered) -> None:
    """Write a zip, and make room for it: what was not used for the longest time goes first. Raises nothing: where it
    cannot be written, the log says so."""
    if made_of is None:
        return
    zipped, path = zip_.zipped, _path(made_of)
    sources = zipped.sources.by_concept
    about = saved.SavedZip(
        sources={c: saved.SavedLoRA(*_identity(of), clip_strength=of.clip_strength) for c, of in sources.items()},
        dials={concept: zipped.dial(concept) for concept in sources},
        method=zipped.method,
        settings=zipped.settings,
        versions=versions(),
        report=zipped.report,
    )
    told: dict[str, Any] = {"key": made_of, "made": time.strftime("%Y-%m-%d %H:%M")}
    told |= {"loss_map": zip_.loss_map, "words": zip_.words}
    told["picture"] = None if zip_.picture is None else _as_text(zip_.picture)
    told["drawn"] = [] if zip_.drawn is None else [_as_text(_image(picture)) for picture in zip_.drawn]
    try:
        told["whole"] = _check(told, about, zipped.coefficients.by_concept, zipped.routing)
        os.makedirs(folder(), exist_ok=True)
        saved.write(path, zipped.coefficients, about, {_KEY: json.dumps(told)}, zipped.routing)
        _make_room()
    except (content.UnknownContent, OSError, ValueError) as error:
        logging.warning("ZipLoRA: this zip could not be remembered on disk: %s", error)


def _make_room() -> None:
    """Files that another process deletes meanwhile are gone all the same."""
    with os.scandir(folder()) as entries:
        found = [(entry.stat().st_mtime, entry.stat().st_size, entry.path) for entry in entries if _is_ours(entry.name)]
    most, total = most_bytes(), 0
    for number, (_, size, path) in enumerate(sorted(found, reverse=True), 1):
        total += size
        if number > MOST or total > most:
            with suppress(OSError):
                os.unlink(path)


def _is_ours(name: str) -> bool:
    return name.endswith(".safetensors") and not name.startswith(".")


def find(made_of: str | None, sources: LoRASources, fitted: FittedSet) -> Remembered | None:
    """A zip that was made of the same, on the same layers, its report saying so; None where there is none.

    A file that is damaged counts as none.
    """
    path = None if made_of is None else _path(made_of)
    if path is None or not os.path.lexists(path):
        return None
    try:
        coefficients, matrices, about = saved.read(path)
        told = json.loads(read_metadata(path)[_KEY])
        whole = told.pop("whole")
        if told["key"] != made_of or whole != _check(told, about, coefficients.by_concept, matrices):
            raise ValueError("its content is not what was written")
        saved.check_fits(os.path.basename(path), coefficients, fitted.loras)
        zipped = ZippedLoRA(
            sources,
            replace(fitted, loras=routing.routed(fitted.loras, matrices)),
            coefficients,
            report=_with_origin(about.report, told["made"], path),
            method=about.method,
            settings=dict(about.settings),
            routing=matrices,
        )
        drawn = [_pixels(_picture(text)) for text in told["drawn"]]
        picture = None if told["picture"] is None else _picture(told["picture"])
        found = Remembered(zipped, told["loss_map"], told["words"], picture, torch.stack(drawn) if drawn else None)
    except _DAMAGED as error:
        if os.path.lexists(path):  # or else another process has just made room
            logging.warning("ZipLoRA: the zip in '%s' is damaged and is made anew: %s", os.path.basename(path), error)
        return None
    with suppress(OSError):
        os.utime(path)
    return found


def _check(told: Mapping[str, Any], about: saved.SavedZip, coefficients: Any, matrices: Any) -> str:
    """Of all that a file holds: a disk may give back other numbers than were written."""
    return content.digest([dict(told), json.dumps(about.as_table(), sort_keys=True), coefficients, matrices])


def _with_origin(report: str, made: str, path: str) -> str:
    where = f"{os.path.basename(folder_paths.get_user_directory())}/{FOLDER}"
    line = (
        f"taken from disk: zipped on {made} of the same files, prompts, settings and model; to zip anew, change the "
        f"seed or delete '{os.path.basename(path)}' in ComfyUI's folder {where}"
    )
    lines = report.split("  \n")
    place = lines.index(DETAILS) if DETAILS in lines else len(lines)
    return "  \n".join([*lines[:place], line, *lines[place:]])


def _image(picture: Tensor) -> Image.Image:
    return Image.fromarray((picture * 255).round().to(torch.uint8).cpu().numpy())


def _pixels(picture: Image.Image) -> Tensor:
    raw = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return raw.reshape(picture.height, picture.width, 3) / 255


def _as_text(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.convert("RGB").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _picture(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text, validate=True))).convert("RGB")
