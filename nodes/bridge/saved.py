"""Zipped pairs on disk: saved with the hashes of their LoRA files, and loaded by them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import comfy.model_management
import folder_paths

from ...ziplora_core import direct, routing, saved
from ...ziplora_core.files import LoRAFileError, shown
from .direct import check_memory
from .disk import paths
from .disk.provenance import bound, versions
from .lora import fitting, hashes, loras
from .lora.zipped import ZippedLoRA

FOLDER = "ziplora"


def register_folder() -> None:
    """Tell the host where zipped pairs are: models/ziplora, and output/ziplora, where they are saved to."""
    for parent in (folder_paths.models_dir, folder_paths.get_output_directory()):
        folder_paths.add_model_folder_path(FOLDER, os.path.join(parent, FOLDER))
    folder_paths.folder_names_and_paths[FOLDER][1].add(".safetensors")


@paths.names_given_back()
def save(zipped: ZippedLoRA, prefix: str, metadata: dict[str, str] | None = None) -> str:
    """Write the coefficients below output/ziplora; returns the file's name as Load Zipped LoRA lists it.

    metadata: more of it. Raises LoRAFileError where a LoRA file has changed since it was read, OSError where nothing
    can be written.
    """
    about = saved.SavedZip(
        sources={concept: bound(source) for concept, source in zipped.sources.by_concept.items()},
        dials={concept: zipped.dial(concept) for concept in zipped.sources.by_concept},
        method=zipped.method,
        settings=zipped.settings,
        versions=versions(),
        report=zipped.report,
    )
    folder = os.path.join(folder_paths.get_output_directory(), FOLDER)
    path = paths.reserve(prefix, folder, ".safetensors")
    return os.path.relpath(saved.write(path, zipped.coefficients, about, metadata, zipped.routing), folder)


def _of_its_size(wanted: saved.SavedLoRA) -> Iterator[str]:
    """Names, in the loras folders, of files as large as one that a pair was zipped from: its old name first.

    From the file system's entries alone: nothing is read. What cannot even be looked at is left out.
    """
    names = folder_paths.get_filename_list("loras")
    for name in [wanted.name, *(n for n in names if n != wanted.name)]:
        with suppress(LoRAFileError):
            if hashes.version(loras.lora_path(name)).size == wanted.size:
                yield name


def _find(wanted: saved.SavedLoRA, of: str) -> str:
    """The name, in the loras folders, of the file with a hash: its old name first, then every file of its size.

    Reads every file whose hash is not known yet; one that cannot be read is passed over. Raises LoRAFileError.
    """
    for name in _of_its_size(wanted):
        comfy.model_management.throw_exception_if_processing_interrupted()
        with suppress(OSError, LoRAFileError):
            if hashes.HASHES.of(loras.lora_path(name)) == wanted.sha256:
                return name
    changed = folder_paths.get_full_path("loras", wanted.name) is not None
    what = "has changed since" if changed else "is missing: it is in no loras folder under any name"
    raise LoRAFileError(
        f"'{shown(of, 255)}' was zipped from '{shown(wanted.name)}' (SHA-256 {shown(wanted.sha256, 12)}), "
        f"which {what}; " + ("restore the file" if changed else "put it back") + ", or zip the pair again"
    )


def zipped_path(name: str) -> str:
    """Raises LoRAFileError where there is no such file."""
    path = folder_paths.get_full_path(FOLDER, name) if isinstance(name, str) else None  # the API may say anything
    if path is None:
        raise LoRAFileError(
            f"'{shown(str(name))}' is missing; put it into models/{FOLDER} or output/{FOLDER}, or choose another file"
        )
    return path


def check(name: str) -> str | None:
    """One sentence on why this file cannot be loaded, or None. Reads its header alone: the server waits meanwhile.

    Its LoRA files are looked for when the node runs: whether one of them is right, only all its bytes can tell.
    """
    try:
        saved.read_about(zipped_path(name))
    except LoRAFileError as error:
        return str(error)
    return None


def fingerprint(name: str) -> list[Any]:
    """Changes when the file or one of its LoRA files does; a LoRA's is the one of its old name, or else one of those
    of its size."""
    path = zipped_path(name)
    about = saved.read_about(path)
    files: list[Any] = [hashes.version(path)]
    for wanted in about.sources.values():
        alike = (loras.fingerprint(other) for other in _of_its_size(wanted))
        first = next(alike, None)
        in_place = first is not None and first.path == folder_paths.get_full_path("loras", wanted.name)
        files.append([first] if in_place else [first, *alike])
    return files


def load(model, name: str) -> ZippedLoRA:
    """A saved pair on a model: ModelPatcher, nothing of which is loaded.

    Raises LoRAFileError for a missing, changed or broken file, and for coefficients that do not fit the model,
    MemoryError.
    """
    coefficients, matrices, about = saved.read(zipped_path(name))
    files = {c: (_find(wanted, name), wanted.strength, wanted.clip_strength) for c, wanted in about.sources.items()}
    sources = loras.load_sources(files)
    for concept, source in sources.by_concept.items():
        if bound(source).sha256 != about.sources[concept].sha256:
            raise LoRAFileError(f"'{source.title}' has changed while '{shown(name, 255)}' was loaded; queue again")
        if about.sources[concept].config not in (None, source.config):
            raise LoRAFileError(
                f"'{shown(name, 255)}' was zipped while 'adapter_config.json' beside '{source.title}' gave its layers "
                "other scales than now, by another alpha; restore that file, or zip again"
            )
    fitted = fitting.fit(sources, model.model)
    if about.method in direct.METHODS:
        check_memory(direct.METHODS[about.method], fitted.loras)
    try:
        fitted = replace(fitted, loras=direct.prepared(fitted.loras, about.method, about.settings))
        saved.check_fits(name, coefficients, fitted.loras)
        fitted = replace(fitted, loras=routing.routed(fitted.loras, matrices))
    except LoRAFileError:
        raise
    except ValueError as error:
        raise LoRAFileError(f"'{name}' has broken metadata ({error}); merge the pair again and save it anew") from error
    return ZippedLoRA(
        sources, fitted, coefficients, dict(about.dials), about.report, about.method, dict(about.settings), matrices
    )
