"""What a server says of the pack's nodes, as files: the contract that graphs rely on, and the English texts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .base import NODES
from .host import ROOT

CONTRACT = ROOT / "tests" / "host" / "object_info.json"
ENGLISH = ROOT / "locales" / "en" / "nodeDefs.json"
_FILES = {
    "subject_lora",
    "content_lora",
    "style_lora",
    "lora",
    "zipped",
    "continue_from",
    "csd",
}  # choices that are a folder's files
_SAMPLING = {"sampler_name": "samplers", "scheduler": "schedulers"}  # choices that are the host's
_TEXTS = {"tooltip", "display_name", "placeholder"}

ObjectInfo = Mapping[str, Any]


def _inputs(info: Mapping[str, Any]) -> dict[str, tuple[bool, list[Any]]]:
    """Input id -> (required, what the server says of it)."""
    kinds = ((True, "required"), (False, "optional"))
    return {name: (must, spec) for must, kind in kinds for name, spec in info["input"].get(kind, {}).items()}


def contract(info: ObjectInfo) -> dict[str, Any]:
    """Ids, types, defaults, ranges and choices of every node, without texts and without names of files."""
    found = {}
    for node in NODES:
        inputs = {}
        for name, (must, spec) in _inputs(info[node]).items():
            options = {k: v for k, v in (spec[1] if len(spec) > 1 else {}).items() if k not in _TEXTS}
            kind = spec[0]
            if name in _FILES and (isinstance(kind, list) or kind == "COMBO"):
                kind = "files"
                options.pop("options", None)
            elif name in _SAMPLING and (isinstance(kind, list) or kind == "COMBO"):
                kind = _SAMPLING[name]
                options.pop("options", None)
            inputs[name] = {"type": kind, "required": must, **options}
        found[node] = {
            "category": info[node]["category"],
            "inputs": inputs,
            "outputs": dict(zip(info[node]["output_name"], info[node]["output"], strict=True)),
            "output_node": info[node]["output_node"],
        }
    return found


def texts(info: ObjectInfo) -> dict[str, Any]:
    """Names, descriptions and tooltips, in the form of the frontend's locale files."""
    found = {}
    for node in NODES:
        outputs = zip(info[node]["output_name"], info[node]["output_tooltips"], strict=True)
        found[node] = {
            "display_name": info[node]["display_name"],
            "description": info[node]["description"],
            "inputs": {
                name: {"name": name, "tooltip": (spec[1] if len(spec) > 1 else {}).get("tooltip", "")}
                for name, (_, spec) in _inputs(info[node]).items()
            },
            "outputs": {str(slot): {"name": name, "tooltip": tip or ""} for slot, (name, tip) in enumerate(outputs)},
        }
    return found


def files(info: ObjectInfo) -> dict[Path, str]:
    """File -> its text."""
    made = {CONTRACT: contract(info), ENGLISH: texts(info)}
    return {path: json.dumps(content, indent=1, ensure_ascii=False) + "\n" for path, content in made.items()}
