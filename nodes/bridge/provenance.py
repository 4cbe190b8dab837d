"""What a file says of how it was made, so that it can be made again, and how a node tells clients of a file."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import Any

from comfy.cli_args import args

from ...ziplora_core.files import LoRAFileError
from . import loras, saved


def workflow(hidden: Any) -> dict[str, str]:
    """The workflow as metadata, under the host's own key; nothing where the host runs with --disable-metadata.

    hidden: a node's hidden inputs, None where no server runs it.
    """
    known = hidden is not None and hidden.prompt is not None
    return {"prompt": json.dumps(hidden.prompt)} if known and not args.disable_metadata else {}


def pair(sources: loras.LoRASources) -> dict[str, str]:
    """Which files a pair was read from, by hash, and with what, as metadata.

    Nothing for files that have changed since, and for what other nodes made.
    """
    try:
        bound = {concept: asdict(saved.bound(source)) for concept, source in sources.by_concept().items()}
    except LoRAFileError:
        return {}
    return {"ziplora_pair": json.dumps({**bound, "versions": saved.versions()})}


def written(name: str) -> dict[str, str]:
    """A file below the output folder, as the host's save nodes show theirs."""
    folder, file = os.path.split(name)
    return {"filename": file, "subfolder": folder.replace(os.sep, "/"), "type": "output"}
