"""The base directory that a ComfyUI of ours runs on: models, inputs and packs, linked (standard library only).

ComfyUI's `--base-directory` keeps all of it out of the ComfyUI tree, so a tree of the user's own stays as it was.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

from .install import ROOT

PACK = "ComfyUI-ZipLoRA"
MINIATURE = "ziplora-miniature"
CHECKPOINT = "miniature_sdxl.safetensors"

FOLDERS = ("models/checkpoints", "models/loras", "input", "output", "temp", "user/default", "custom_nodes")
# The frontend greets a new user with a window over the graph; nobody is there to close it.
SETTINGS = {"Comfy.TutorialCompleted": True}


class MissingMiniature(RuntimeError):
    """A part of the miniature model is not in the checkout."""


def miniature_files(root: Path = ROOT) -> tuple[Path, list[Path], list[Path]]:
    """The miniature's checkpoint, its LoRAs and its folders of reference pictures; MissingMiniature where absent."""
    demo = root / "demo"
    checkpoint = demo / "weights" / CHECKPOINT
    loras = sorted((demo / "loras").glob("*.safetensors"))
    pictures = sorted({picture.parent for picture in (demo / "pictures").glob("*/*.png")})
    parts = {"checkpoint": checkpoint.is_file(), "LoRAs": loras, "pictures": pictures}
    parts["host extension"] = (demo / "host_extension" / "__init__.py").is_file()
    missing = [name for name, found in parts.items() if not found]
    if missing:
        raise MissingMiniature(
            f"The miniature model's {', '.join(missing)} are missing under demo/: restore them from git, "
            "or train them again with demo/train.py."
        )
    return checkpoint, loras, pictures


def make_base(base: Path, *, miniature: bool = True, root: Path = ROOT) -> Path:
    """Make or complete a base directory with the pack, and with the miniature where wanted. Returns it."""
    for folder in FOLDERS:
        (base / folder).mkdir(parents=True, exist_ok=True)
    settings = base / "user" / "default" / "comfy.settings.json"
    if not settings.is_file():
        settings.write_text(json.dumps(SETTINGS), encoding="utf-8")
    link(root, base / "custom_nodes" / PACK)
    if miniature:
        checkpoint, loras, pictures = miniature_files(root)
        link(root / "demo" / "host_extension", base / "custom_nodes" / MINIATURE)
        link(checkpoint, base / "models" / "checkpoints" / checkpoint.name)
        for lora in loras:
            link(lora, base / "models" / "loras" / lora.name)
        for folder in pictures:
            link(folder, base / "input" / folder.name)
    return base


def link(source: Path, target: Path) -> None:
    """Make `target` lead to `source`: a symbolic link, or what Windows allows without special rights."""
    if target.is_symlink():
        if os.path.realpath(target) == os.path.realpath(source):
            return
        target.unlink()
    elif target.exists():
        if os.path.samefile(target, source) or os.path.realpath(target) == os.path.realpath(source):
            return
        if target.is_dir():
            raise FileExistsError(f"{target} is a folder of its own, expected a link to {source}: remove it.")
        target.unlink()
    try:
        target.symlink_to(source, target_is_directory=source.is_dir())
    except OSError:
        if os.name != "nt":
            raise
        if source.is_dir():  # a junction needs no rights
            command = ["cmd", "/c", "mklink", "/J", str(target), str(source)]
            subprocess.run(command, check=True, capture_output=True)
        else:
            shutil.copy2(source, target)
