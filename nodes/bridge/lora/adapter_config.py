"""The alphas of a LoRA file that stand in its header or in peft's file beside it, put to its matrices."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping

from torch import Tensor

from ....ziplora_core import adapter_config, other_kinds
from ....ziplora_core.files import read_metadata
from . import beside

_OWN = "adapter_model"  # what peft calls the file that its configuration is of


def place(path: str) -> str | None:
    """peft's file beside a LoRA file; None where there is none, or where it may be another LoRA's."""
    found = _beside(path)
    return found if os.path.isfile(found) and _is_its_own(path) else None  # a listing may be long: it comes last


def _beside(path: str) -> str:
    return os.path.join(os.path.dirname(path), adapter_config.FILE)


def _is_its_own(path: str) -> bool:
    own = os.path.splitext(os.path.basename(path))[0] == _OWN
    return own or beside.alone(path)


def completed(path: str, title: str, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...], str]:
    """(The file's tensors with their alphas, notes on where these come from, a short digest of what they are: "" where
    nothing gives any). Raises LoRAFileError as a header does."""
    if other_kinds.present(tensors):
        return _of_other_kinds(path, title, tensors)
    notes: list[str] = []
    metadata = read_metadata(path)
    configs, where = adapter_config.in_header(metadata), f"its header ({adapter_config.HEADER})"
    if not configs and adapter_config.HEADER in metadata:
        notes.append(f"'{title}' says in {where} what is no configuration of peft's; it is ignored")
    why = ""
    if not configs:
        configs, why = _of_file(path, tensors)
        where = f"'{adapter_config.FILE}' beside it"
    found, scales = adapter_config.with_alphas(tensors, configs)
    if scales:
        low, high = min(scales.values()), max(scales.values())
        times = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
        notes.append(
            f"'{title}' has its alpha in {where}: {len(scales)} layers count {times} times, as the library that wrote "
            "it has them; ComfyUI's own loader does not read this, and takes what it knows of the file at 1"
        )
    elif not configs and adapter_config.lacks_alpha(tensors):
        why = why or f"peft writes it into '{adapter_config.FILE}', which is not beside it"
        notes.append(
            f"'{title}' gives no alpha: {why}, so its matrices count as they are; to have it as it was trained, put it "
            "and the file that was written with it into a folder of their own"
        )
    elif not configs and why and place(path) is not None:
        notes.append(f"of '{title}': {why}; it is ignored")
    return found, tuple(notes), _digest(scales)


def _of_other_kinds(
    path: str, title: str, tensors: dict[str, Tensor]
) -> tuple[dict[str, Tensor], tuple[str, ...], str]:
    """As `completed`, of a file without alpha, of which peft's configuration says something else."""
    text = beside.text(_beside(path), path, adapter_config.LARGEST, []) if place(path) is not None else None
    table = adapter_config.table_of(text or "")
    found, said = other_kinds.settled(tensors, table)
    notes: tuple[str, ...] = ()
    if table.get("peft_type") != "OFT" and adapter_config.lacks_alpha(tensors, other_kinds.OFT):
        notes = (
            f"'{title}' does not say how its OFT is computed: peft writes it into '{adapter_config.FILE}', which is "
            f"not beside it or another LoRA's; it counts as by default, a series of {other_kinds.DEFAULT_TERMS} terms",
        )
    return found, notes, _digest(said)


def _of_file(path: str, tensors: dict[str, Tensor]) -> tuple[dict[str, adapter_config.AdapterConfig], str]:
    """(What the file beside a LoRA says of it, why that is nothing where there is such a file)."""
    if not os.path.isfile(_beside(path)):
        return {}, ""
    if not _is_its_own(path):
        return {}, f"'{adapter_config.FILE}' beside it may be another LoRA's, as they share a folder"
    refused: list[str] = []
    text = beside.text(_beside(path), path, adapter_config.LARGEST, refused)
    if text is None:
        return {}, refused[0].removesuffix("; it is ignored") if refused else ""
    configs = adapter_config.in_file(text)
    if not configs:
        return {}, f"'{adapter_config.FILE}' beside it {adapter_config.why_unusable(text)}"
    if not adapter_config.fits(tensors, configs):
        return {}, f"'{adapter_config.FILE}' beside it names other ranks than it has"
    return configs, ""


def _digest(scales: Mapping[str, float]) -> str:
    return hashlib.sha256(json.dumps(sorted(scales.items())).encode()).hexdigest()[:16] if scales else ""
