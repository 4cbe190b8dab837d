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
from ....ziplora_core.files import LoRAFileError, opened, shown
from ..lora.described import DETAILS
from ..lora.fitting import FittedSet
from ..lora.loras import LoRASource, LoRASources
from ..lora.zipped import ZippedLoRA
from . import content
from .provenance import versions

FOLDER = "ziplora_zips"  # in the host's user folder, which restarts leave alone
MOST = 200  # files
_MEGABYTES = 1000  # where ZIPLORA_REMEMBER_MB says nothing
_NOT_KEPT = "this zip is not remembered on disk: "
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


def key(model, sources: LoRASources, **given: Any) -> tuple[str | None, str]:
    """(A hash of all that a zip depends on, ""); or None and a sentence on why there is none, which is empty where
    nothing is to be remembered.

    model: ModelPatcher, unchanged. given: what else there is: conditioning, latents, settings. The first zip on a model
    reads all of its weights. Interrupts pass through.
    """
    if not most_bytes() > 0:
        return None, ""
    try:
        loras = {concept: _identity(source).as_table() for concept, source in sources.by_concept.items()}
        told = [list(sources.by_concept), sources.warnings, sources.own_text_encoders]
        return content.digest([versions(), content.of_code(), loras, told, content.of_model(model), given]), ""
    except content.UnknownContent as reason:
        why = f"it depends on {reason}"
    except (OSError, RuntimeError, *_OF_OTHER_HOSTS) as error:
        why = f"what it depends on could not be read ({shown(str(error))})"
    logging.info("ZipLoRA: %s%s.", _NOT_KEPT, why)
    return None, f"{_NOT_KEPT}{why}"


def _identity(source: LoRASource) -> saved.SavedLoRA:
    """What tells a LoRA from any other; of one that comes from no file, the hash of its tensors."""
    sha256, size = source.sha256 or content.digest(source.tensors), source.version.size if source.version else 0
    return saved.SavedLoRA(source.name, sha256, size, source.strength, source.clip_strength, source.config)


def _path(made_of: str) -> str:
    return os.path.join(folder(), f"{made_of[:20]}.safetensors")


def keep(made_of: str | None, zip_: Remembered) -> str:
    """Write a zip, and make room for it: what was not used for the longest time goes first. Raises nothing: where it
    is not written, it gives a sentence on why."""
    if made_of is None:
        return ""
    zipped, path = zip_.zipped, _path(made_of)
    sources = zipped.sources.by_concept
    about = saved.SavedZip(
        sources={concept: _identity(of) for concept, of in sources.items()},
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
        text = json.dumps(told)
        vectors = [m for of in zipped.coefficients.by_concept.values() for m in of.values()]
        size = len(text) + 4 * sum(m.numel() for m in [*vectors, *zipped.routing.values()])
        if size > most_bytes():  # it would push out every other
            return f"{_NOT_KEPT}it takes {size / 1e6:.0f} MB, and ZIPLORA_REMEMBER_MB allows {most_bytes() / 1e6:g}"
        os.makedirs(folder(), exist_ok=True)
        saved.write(path, zipped.coefficients, about, {_KEY: text}, zipped.routing)
        _make_room()
    except (content.UnknownContent, OSError, ValueError) as error:
        logging.warning("ZipLoRA: this zip could not be remembered on disk: %s", error)
        return f"{_NOT_KEPT}it could not be written ({shown(str(error))})"
    return ""


def _make_room() -> None:
    """Files that another process deletes meanwhile are gone all the same."""
    found = []
    with os.scandir(folder()) as entries:
        for entry in (entry for entry in entries if _is_ours(entry.name)):
            with suppress(FileNotFoundError):
                about = entry.stat()
                found.append((about.st_mtime, about.st_size, entry.path))
    most, stay, total = most_bytes(), 0, 0
    for _, size, path in sorted(found, reverse=True):
        if stay < MOST and total + size <= most:
            stay, total = stay + 1, total + size
        else:
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
        with opened(path) as file:
            (coefficients, matrices, about), told = saved.read_opened(file), json.loads(file.metadata[_KEY])
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
