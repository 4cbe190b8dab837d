"""Zipped pairs on disk: saved with the hashes of their LoRA files, found again by them."""

from __future__ import annotations

import os
from dataclasses import replace

import comfyui_version
import folder_paths
import torch

from ...ziplora_core import __version__, direct, saved
from ...ziplora_core.files import LoRAFileError, sha256, shown
from . import fitting, loras, paths

FOLDER = "ziplora"


def register_folder() -> None:
    """Tell the host where zipped pairs are: models/ziplora, and output/ziplora, where they are saved to."""
    for parent in (folder_paths.models_dir, folder_paths.get_output_directory()):
        folder_paths.add_model_folder_path(FOLDER, os.path.join(parent, FOLDER))
    folder_paths.folder_names_and_paths[FOLDER][1].add(".safetensors")


_hashes: dict[tuple[str, int, int], str] = {}


def file_hash(version: tuple[str, int, int]) -> str:
    """SHA-256 of a file, computed once per version of it (path, size, modification time)."""
    if version not in _hashes:
        _hashes[version] = sha256(version[0])
    return _hashes[version]


def bound(source: loras.LoRASource) -> saved.SavedLoRA:
    """A LoRA file by name and hash. Raises LoRAFileError where it has changed since it was read."""
    if source.version is None:
        raise LoRAFileError(
            f"{source.name} comes from another node, not from a file that the coefficients could be bound to; load its "
            "file with Load LoRA Pair and zip again, or use Export Merged LoRA"
        )
    if loras.fingerprint(source.name) != source.version:
        raise LoRAFileError(f"'{source.name}' has changed since it was loaded; queue again, then save")
    return saved.SavedLoRA(source.name, file_hash(source.version), source.version[1], source.strength)


def versions() -> dict[str, str]:
    """Of what a result may depend on."""
    return {"ziplora": __version__, "comfyui": comfyui_version.__version__, "torch": torch.__version__}


def save(zipped: loras.ZippedLoRA, prefix: str, made_by: dict[str, str] | None = None) -> str:
    """Write the coefficients below output/ziplora; returns the file's name as Load Zipped LoRA lists it.

    made_by: more metadata.

    Raises LoRAFileError where a LoRA file has changed since it was read, OSError where nothing can be written.
    """
    about = saved.SavedZip(
        content=bound(zipped.sources.content),
        style=bound(zipped.sources.style),
        dials=(zipped.content_strength, zipped.style_strength),
        method=zipped.method,
        settings=zipped.settings,
        versions=versions(),
        report=zipped.report,
    )
    folder = os.path.join(folder_paths.get_output_directory(), FOLDER)
    path = paths.next_path(prefix, folder, ".safetensors")
    saved.write(path, zipped.coefficients, about, made_by)
    return os.path.relpath(path, folder)


def _find(wanted: saved.SavedLoRA, of: str) -> str:
    """The name, in the loras folders, of the file with a hash: its old name first, then every file of its size."""
    changed = False
    names = folder_paths.get_filename_list("loras")
    for name in [wanted.name, *(n for n in names if n != wanted.name)]:
        path = folder_paths.get_full_path("loras", name)
        if path is None or os.path.getsize(path) != wanted.size:
            changed |= path is not None and name == wanted.name
            continue
        if file_hash(loras.fingerprint(name)) == wanted.sha256:
            return name
        changed |= name == wanted.name
    what = "has changed since" if changed else "is missing: it is in no loras folder under any name"
    raise LoRAFileError(
        f"'{of}' was zipped from '{shown(wanted.name)}' (SHA-256 {shown(wanted.sha256, 12)}), which {what}; "
        + ("restore the file" if changed else "put it back")
        + ", or zip the pair again"
    )


def zipped_path(name: str) -> str:
    """Raises LoRAFileError where there is no such file."""
    path = folder_paths.get_full_path(FOLDER, name) if isinstance(name, str) else None  # the API may say anything
    if path is None:
        raise LoRAFileError(f"'{shown(str(name))}' is missing; put it into the {FOLDER} folder or choose another file")
    return path


def check(name: str) -> str | None:
    """One sentence on why this file cannot be loaded, or None."""
    try:
        _, about = saved.read(zipped_path(name))
        for wanted in (about.content, about.style):
            _find(wanted, name)
    except LoRAFileError as error:
        return str(error)
    return None


def fingerprint(name: str) -> list[tuple[str, int, int]]:
    """Changes when the file or one of its LoRA files does."""
    path = zipped_path(name)
    status = os.stat(path)
    about = saved.read_about(path)
    bound = [loras.fingerprint(_find(wanted, name)) for wanted in (about.content, about.style)]
    return [(path, status.st_size, status.st_mtime_ns), *bound]


def load(model, name: str) -> loras.ZippedLoRA:
    """A saved pair on a model: ModelPatcher, nothing of which is loaded.

    Raises LoRAFileError for a missing, changed or broken file, and for coefficients that do not fit the model.
    """
    coefficients, about = saved.read(zipped_path(name))
    found = {c: _find(w, name) for c, w in (("content", about.content), ("style", about.style))}
    sources = loras.load_pair(found["content"], found["style"], about.content.strength, about.style.strength)
    for source, wanted in ((sources.content, about.content), (sources.style, about.style)):
        if bound(source).sha256 != wanted.sha256:
            raise LoRAFileError(f"'{source.name}' has changed while '{name}' was loaded; queue again")
    fitted = fitting.fit(sources, model.model)
    try:
        fitted = replace(fitted, pair=direct.prepared(fitted.pair, about.method, about.settings))
    except ValueError as error:
        raise LoRAFileError(f"'{name}' has broken metadata ({error}); merge the pair again and save it anew") from error
    saved.check_fits(name, coefficients, fitted.pair)
    return loras.ZippedLoRA(
        sources, fitted, coefficients, *about.dials, about.report, about.method, dict(about.settings)
    )
