"""Which ComfyUI and which Python the tests run on: those of `.dev/`, or a developer's own (standard library only).

Two environment variables choose another host: `COMFYUI_PATH` names a ComfyUI tree of one's own, and `COMFYUI_PYTHON`
the Python that runs it. Neither is ever written to: what the tests need besides goes into an environment of ours that
looks through to the packages of that Python. A third, `COMFYUI_FRONTEND`, names the folder of a frontend that servers
give pages in the place of the host's own.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEV = ROOT / ".dev"

# Threads that wait for work sleep instead of spinning. Where anything else wants the cores, spinning makes the small
# model's many short operations twenty times slower; where nothing does, sleeping costs next to nothing.
THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}


class SetupError(RuntimeError):
    """Set-up cannot go on; the message says in one sentence what to do."""


@dataclass(frozen=True)
class Host:
    """Where ComfyUI and the Python of the tests are. `own_python` is the user's, None where ours does everything."""

    tree: Path
    venv: Path
    own_tree: bool
    own_python: str | None

    @property
    def python(self) -> Path:
        return self.script("python")

    def script(self, name: str) -> Path:
        """Path of a program of the virtual environment."""
        return self.venv / ("Scripts" if os.name == "nt" else "bin") / (name + (".exe" if os.name == "nt" else ""))


def current_host() -> Host:
    """The host that the environment variables ask for; installs nothing."""
    own = os.environ.get("COMFYUI_PATH")
    own_python = os.environ.get("COMFYUI_PYTHON")
    if own_python and not own:
        raise SetupError("COMFYUI_PYTHON is set but COMFYUI_PATH is not: name the ComfyUI tree that it runs as well.")
    if not own:
        return Host(DEV / "comfyui", DEV / "venv", own_tree=False, own_python=None)
    tree = Path(own).expanduser().resolve()
    if not (tree / "main.py").is_file():
        raise SetupError(f"COMFYUI_PATH names {tree}, which holds no main.py: give the folder of a ComfyUI tree.")
    if own_python and shutil.which(own_python) is None:
        raise SetupError(f"COMFYUI_PYTHON names {own_python}, which is not a program: give the path of a Python.")
    key = hashlib.sha256(f"{tree}|{own_python}".encode()).hexdigest()[:8]
    return Host(tree, DEV / f"venv-{key}", own_tree=True, own_python=own_python)


def named_frontend() -> Path | None:
    """The frontend's folder that COMFYUI_FRONTEND names. SetupError where it holds no index.html."""
    named = os.environ.get("COMFYUI_FRONTEND")
    if not named:
        return None
    folder = Path(named).expanduser().resolve()
    if not (folder / "index.html").is_file():
        raise SetupError(f"COMFYUI_FRONTEND names {folder}, which holds no index.html: give the folder that has it.")
    return folder
