"""The base directory that a ComfyUI of ours runs on: models and packs linked, inputs copied (standard library only).

ComfyUI's `--base-directory` keeps all of it out of the ComfyUI tree, so a tree of the user's own stays as it was.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .host import ROOT

PACK = "ComfyUI-ZipLoRA"
MINIATURE = "ziplora-miniature"
CHECKPOINT = "miniature_sdxl.safetensors"

NODES = (
    "ZipLoRAs",
    "ZipCheck",
    "LoadLoRAPair",
    "ZipLoRAOptimize",
    "DirectMergeLoRA",
    "StyleStrength",
    "ApplyZippedLoRA",
    "CompareMerges",
    "ZippedLoRAReport",
    "SaveZippedLoRA",
    "LoadZippedLoRA",
    "ExportMergedLoRA",
    "SparsifyLoRA",
    "ZipLoRAScores",
    "BlindABSheet",
    "TrainConceptLoRA",
    "TrainEmbedding",
    "SplitConcept",
    "TrainCustomDiffusion",
    "MergeCustomDiffusion",
    "TrainEDLoRA",
    "FuseTextEncoders",
    "PairLoRAs",
    "UnZipLoRA",
    "LoadLoRAStack",
    "ZipLoRAReference",
    "ConceptStrengths",
    "TwoScaleGuider",
    "KLoRA",
)
FOLDERS = ("models/checkpoints", "models/loras", "input", "output", "temp", "user/default", "custom_nodes")
# Windows over the graph, which nobody is there to close: a greeting, and an offer to download what a graph names.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "Comfy.Workflow.ShowMissingModelsWarning": False,
}


class MissingMiniature(RuntimeError):
    """A part of the miniature model is not in the checkout."""


@dataclass(frozen=True)
class Miniature:
    """The miniature model's files: checkpoint, LoRAs, folders of reference pictures, and the host extension."""

    checkpoint: Path
    loras: list[Path]
    pictures: list[Path]
    extension: Path


def find_miniature(demo: Path | None = None) -> Miniature:
    """The shipped miniature, or the one in the folder that ZIPLORA_MINIATURE names; MissingMiniature where not whole.

    The folder is laid out as demo/ is: world.json, weights/, loras/*.safetensors, pictures/<name>/*.png.
    """
    demo = demo or Path(os.environ.get("ZIPLORA_MINIATURE") or ROOT / "demo").resolve()
    extension = ROOT / "demo" / "host_extension"
    checkpoint = demo / "weights" / CHECKPOINT
    loras = sorted((demo / "loras").glob("*.safetensors"))
    pictures = sorted({picture.parent for picture in (demo / "pictures").glob("*/*.png")})
    parts = {"checkpoint": checkpoint.is_file(), "LoRAs": loras, "pictures": pictures}
    parts["world.json"] = (demo / "world.json").is_file()  # what each LoRA is, and its prompt
    missing = [name for name, found in parts.items() if not found]
    if missing:
        raise MissingMiniature(
            f"The miniature model is not whole in {demo} ({', '.join(missing)} not found): restore demo/ from git, "
            "or train the model again with `python3 dev.py train`."
        )
    return Miniature(checkpoint, loras, pictures, extension)


def make_base(base: Path, *, miniature: bool = True) -> Path:
    """Make or complete a base directory with the pack, and with the miniature where wanted. Returns it."""
    found = find_miniature() if miniature else None
    for folder in FOLDERS:
        (base / folder).mkdir(parents=True, exist_ok=True)
    settings = base / "user" / "default" / "comfy.settings.json"
    if not settings.is_file():
        settings.write_text(json.dumps(SETTINGS), encoding="utf-8")
    link(ROOT, base / "custom_nodes" / PACK)
    if found is not None:
        link(found.extension, base / "custom_nodes" / MINIATURE)
        link(found.checkpoint, base / "models" / "checkpoints" / found.checkpoint.name)
        for lora in found.loras:
            link(lora, base / "models" / "loras" / lora.name)
        for pictures in found.pictures:
            place(pictures, base / "input" / pictures.name)
    return base


def place(folder: Path, target: Path) -> None:
    """Copy a folder of pictures: newer hosts follow no link out of their input folder."""
    if target.is_symlink():
        target.unlink()
    shutil.copytree(folder, target, dirs_exist_ok=True)


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
