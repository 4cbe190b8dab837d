"""The alphas of a LoRA file that stand in its header or in peft's file beside it, put to its matrices."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping

from torch import Tensor

from ....ziplora_core import adapter_config
from ....ziplora_core.files import read_metadata
from . import beside

_OWN = "adapter_model"  # what peft calls the file that its configuration is of


def place(path: str) -> str | None:
    """peft's file beside a LoRA file; None where there is none, or where it may be another LoRA's."""
    found = os.path.join(os.path.dirname(path), adapter_config.FILE)
    own = os.path.splitext(os.path.basename(path))[0] == _OWN or beside.alone(path)
    return found if own and os.path.isfile(found) else None


def completed(path: str, title: str, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...], str]:
    """(The file's tensors with their alphas, notes on where these come from, a short digest of what they are: "" where
    nothing gives any). Raises LoRAFileError as a header does."""
    notes: list[str] = []
    metadata = read_metadata(path)
    configs, where = adapter_config.in_header(metadata), f"its header ({adapter_config.HEADER})"
    if not configs and adapter_config.HEADER in metadata:
        notes.append(f"'{title}' says in {where} what is no configuration of peft's; it is ignored")
    file = place(path)
    if not configs and file is not None:
        text = beside.text(file, path, adapter_config.LARGEST, notes)
        configs, where = adapter_config.in_file(text or ""), f"'{adapter_config.FILE}' beside it"
        if not adapter_config.fits(tensors, configs):
            notes.append(f"'{adapter_config.FILE}' beside '{title}' names other ranks than it has; it is ignored")
            configs = {}
    found, scales = adapter_config.with_alphas(tensors, configs)
    if scales:
        low, high = min(scales.values()), max(scales.values())
        times = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
        notes.append(
            f"'{title}' has its alpha in {where}: {len(scales)} layers count {times} times, as the library that wrote "
            "it has them; ComfyUI's own loader does not read this, and takes what it knows of the file at 1"
        )
    elif not configs and adapter_config.lacks_alpha(tensors):
        notes.append(
            f"'{title}' gives no alpha: peft writes it into '{adapter_config.FILE}', which is not beside it, so its "
            "matrices count as they are; to have it as it was trained, put both into a folder of their own"
        )
    return found, tuple(notes), _digest(scales)


def _digest(scales: Mapping[str, float]) -> str:
    return hashlib.sha256(json.dumps(sorted(scales.items())).encode()).hexdigest()[:16] if scales else ""
