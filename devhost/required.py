"""Hides the developers' tools from the servers of the tests: what ComfyUI and this pack require is found, they are not.

So every node that a test runs on a server runs where `pip install -r requirements.txt` was all that a user did beside
installing ComfyUI.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from .host import ROOT, current_host
from .install import HOST_EXTRAS, TOOLS, requirements

FOLDER = Path(__file__).parent / "only_required"  # on the server's path: Python imports `sitecustomize` from it
VARIABLE = "ZIPLORA_NOT_REQUIRED"  # modules, with commas between


@functools.cache
def environment() -> dict[str, str]:
    """Environment variables with which a Python process finds everything that is installed but our tools."""
    return {"PYTHONPATH": str(FOLDER), VARIABLE: ",".join(sorted(tools()))}


def tools() -> set[str]:
    """Top-level modules of the tools, and of what they alone need."""
    required = _needs([*requirements(current_host().tree, whole=True), *HOST_EXTRAS, *requirements(ROOT)])
    alone = _needs(TOOLS) - required
    owners = metadata.packages_distributions()
    return {module for module, names in owners.items() if {canonicalize_name(name) for name in names} <= alone}


def _needs(lines: Iterable[str]) -> set[str]:
    """The packages of these lines of requirements, and all that the installed ones of them need; canonical names."""
    todo = [Requirement(line) for line in lines]
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
    return {name for name, _ in seen}
