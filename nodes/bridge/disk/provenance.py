"""Metadata from which a file can be computed again, and how a node tells clients of a file."""

from __future__ import annotations

import json
import os
from typing import Any

import comfyui_version
import torch
from comfy.cli_args import args

from ....ziplora_core import __version__, saved
from ....ziplora_core.files import LoRAFileError
from ..lora import hashes, loras


def bound(source: loras.LoRASource) -> saved.SavedLoRA:
    """A LoRA file by name and hash. Raises LoRAFileError where it holds other bytes than when it was read."""
    if source.version is None or source.sha256 is None:
        raise LoRAFileError(
            f"{source.title} comes from another node, not from a file that the coefficients could be bound to; load "
            "its file with Load LoRA Pair and zip again, or use Export Merged LoRA"
        )
    same = loras.fingerprint(source.name) == source.version
    if not same and hashes.HASHES.checked(loras.lora_path(source.name)) != source.sha256:
        raise LoRAFileError(f"'{source.title}' has changed since it was loaded; queue again, then save")
    strengths = source.strength, source.clip_strength
    return saved.SavedLoRA(source.name, source.sha256, source.version.size, *strengths, source.config)


def versions() -> dict[str, str]:
    """Of what a result may depend on."""
    return {"ziplora": __version__, "comfyui": comfyui_version.__version__, "torch": torch.__version__}


def workflow(hidden: Any) -> dict[str, str]:
    """The workflow as metadata, under the host's own key; nothing where the host runs with --disable-metadata.

    hidden: a node's hidden inputs, None where no server runs it.
    """
    known = hidden is not None and hidden.prompt is not None
    return {"prompt": json.dumps(hidden.prompt)} if known and not args.disable_metadata else {}


def pair(sources: loras.LoRASources) -> dict[str, str]:
    """Which files a set of LoRAs was read from, by hash, and with what, as metadata.

    Nothing for files that have changed since, and for LoRAs that come from other nodes.
    """
    try:
        files = {concept: bound(source).as_table() for concept, source in sources.by_concept.items()}
    except LoRAFileError:
        return {}
    return {"ziplora_pair": json.dumps({**files, "versions": versions()})}


def written(name: str) -> dict[str, str]:
    """A file below the output folder, as the host's save nodes show theirs."""
    folder, file = os.path.split(name)
    return {"filename": file, "subfolder": folder.replace(os.sep, "/"), "type": "output"}
