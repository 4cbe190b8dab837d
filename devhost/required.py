"""Which packages a server of the tests may import: what ComfyUI and this pack require, and no developer's tool.

So every node that a test runs on a server runs where `pip install -r requirements.txt` was all that a user did beside
installing ComfyUI.
"""

from __future__ import annotations

import functools
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from .host import ROOT, current_host

FOLDER = Path(__file__).parent / "only_required"  # on the server's path: Python imports `sitecustomize` from it
VARIABLE = "ZIPLORA_NOT_REQUIRED"  # modules, with commas between
ALWAYS = {"pip", "setuptools"}  # in every environment
UNSAID = ("requests",)  # ComfyUI imports it as it starts, though no file of its names it


@functools.cache
def environment() -> dict[str, str]:
    """What makes a Python process refuse to import anything else, as environment variables."""
    return {"PYTHONPATH": str(FOLDER), VARIABLE: ",".join(sorted(not_required()))}


def not_required() -> set[str]:
    """Top-level modules of the installed packages that neither ComfyUI nor this pack requires."""
    allowed = required()
    of_module = metadata.packages_distributions()
    return {name for name, owners in of_module.items() if not {canonicalize_name(owner) for owner in owners} & allowed}


def required() -> set[str]:
    """Installed packages that the two files of requirements name, and all that these need; canonical names."""
    files = [current_host().tree / "requirements.txt", ROOT / "requirements.txt"]
    lines = [line.split("#")[0].strip() for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    todo = [Requirement(line) for line in (*lines, *UNSAID) if line and not line.startswith("-")]
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        wanted = todo.pop()
        name, extras = canonicalize_name(wanted.name), frozenset(wanted.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # left out of the environment, as torchaudio is
            continue
        for need in map(Requirement, needs):
            if not need.marker or any(need.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                todo.append(need)
    return {name for name, _ in seen} | ALWAYS
