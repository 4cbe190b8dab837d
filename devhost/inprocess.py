"""The pack inside this process, imported as the host imports it: for tests and benchmarks of host objects."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from .base import find_miniature

ROOT = Path(__file__).resolve().parent.parent
NAME = "ziplora_pack"
MINIATURE = "ziplora_miniature"


def comfyui_path() -> Path:
    """The ComfyUI tree that COMFYUI_PATH names, or the one that `dev.py setup` made."""
    path = Path(os.environ.get("COMFYUI_PATH") or ROOT / ".dev" / "comfyui")
    if not (path / "comfy" / "ops.py").is_file():
        raise FileNotFoundError(f"no ComfyUI at '{path}'; run `python3 dev.py setup` or set COMFYUI_PATH")
    return path


def load_pack(cpu: bool | None = None) -> ModuleType:
    """Import ComfyUI and then the pack, as the package `ziplora_pack`; twice gives the same module."""
    import_comfyui(cpu)
    return load_package(ROOT, NAME)


def load_miniature_extension() -> ModuleType:
    """Import the extension that teaches ComfyUI's loader the miniature model."""
    import_comfyui()
    return load_package(find_miniature().extension, MINIATURE)


def import_comfyui(cpu: bool | None = None) -> None:
    """Put ComfyUI's tree first on sys.path and choose its device, which it does once, when it is imported.

    cpu: None for what ZIPLORA_TEST_DEVICE says, "auto" for the GPU that ComfyUI finds; the CPU where it is not set.
    The pack's root must come after the tree, or its folder `nodes` would hide ComfyUI's module of that name.
    """
    os.environ.setdefault("ZIPLORA_REMEMBER_MB", "0")  # who zips twice here wants it computed twice
    tree = str(comfyui_path())
    sys.path[:] = [tree, *(path for path in sys.path if path != tree)]
    from comfy.cli_args import args

    args.cpu = os.environ.get("ZIPLORA_TEST_DEVICE", "cpu") == "cpu" if cpu is None else cpu
    import nodes

    if Path(nodes.__file__ or "").parent != Path(tree):
        raise ImportError(f"`import nodes` found {nodes.__file__}, expected ComfyUI's own in {tree}")


def load_package(folder: Path, name: str) -> ModuleType:
    """Import a folder as a package of any name, as ComfyUI's loader does; twice gives the same module."""
    if name in sys.modules:
        return sys.modules[name]
    init = folder / "__init__.py"
    spec = importlib.util.spec_from_file_location(name, init, submodule_search_locations=[str(folder)])
    if spec is None or spec.loader is None:
        raise ImportError(f"{init} is no Python package")
    package = importlib.util.module_from_spec(spec)
    sys.modules[name] = package
    try:
        spec.loader.exec_module(package)
    except BaseException:
        del sys.modules[name]
        raise
    return package
