"""Tests inside ComfyUI's own process: for what only its objects can show, such as a gradient through a patcher.

ComfyUI's tree is put on sys.path, the pack is not: it is loaded from its folder, as ComfyUI's loader does, under the
name `ziplora_pack`. So a test says `from ziplora_pack.nodes.bridge import ...` inside its functions, or takes the
fixture `pack`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


class Loaded(NamedTuple):
    """What CheckpointLoaderSimple returns."""

    model: Any
    clip: Any
    vae: Any


def pytest_configure(config: pytest.Config) -> None:
    """Choose the device before anything of ComfyUI is imported, and load the pack."""
    if config.getoption("numprocesses", None):
        return  # this process shares tests out and runs none
    sys.path.append(str(ROOT))  # last: in front, the pack's folder `nodes` would hide ComfyUI's module
    from devhost.inprocess import load_pack

    load_pack()
    import torch

    # The tensors are tiny: more threads only wait for each other, long under other load.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(scope="session")
def pack() -> ModuleType:
    """The pack, loaded as ComfyUI loads it."""
    return sys.modules["ziplora_pack"]


@pytest.fixture(scope="session")
def miniature_extension() -> ModuleType:
    """The host extension that teaches ComfyUI's loader the miniature model."""
    from devhost.inprocess import load_miniature_extension

    return load_miniature_extension()


@pytest.fixture(scope="session")
def load_miniature(miniature_extension: ModuleType) -> Callable[..., Loaded]:
    """`load_miniature(dtype=torch.float16)` loads the shipped checkpoint anew, as the stock loader does.

    `dtype` is the UNet's storage type (None: ComfyUI's own choice); further keywords are its model options.
    """
    import comfy.sd

    from devhost.base import find_miniature

    checkpoint = str(find_miniature().checkpoint)

    def load(dtype: Any = None, **options: Any) -> Loaded:
        if dtype is not None:
            options["dtype"] = dtype
        model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(checkpoint, model_options=options)
        return Loaded(model, clip, vae)

    return load


@pytest.fixture
def miniature(load_miniature: Callable[..., Loaded]) -> Loaded:
    """A freshly loaded miniature in ComfyUI's own choice of precision: a test may do with it as it likes."""
    return load_miniature()


@pytest.fixture(scope="session")
def lora_files() -> dict[str, Path]:
    """The shipped LoRAs by name, without the ending."""
    from devhost.base import find_miniature

    return {path.stem: path for path in find_miniature().loras}


@pytest.fixture(autouse=True)
def leave_no_model_loaded() -> Any:
    """Unload every model after each test, so that none sees what another has patched."""
    yield
    import comfy.model_management

    comfy.model_management.unload_all_models()
