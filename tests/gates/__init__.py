"""Host extension of the tests: a prompt that is certainly still running, until the test says that it may end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import comfy.model_management as management
from comfy.comfy_types import IO

_PATIENCE = 120.0  # seconds, after which a gate that nobody opens is an error


class WaitAtGate:
    """Passes on what comes in, once a file is there. Can be interrupted."""

    RETURN_TYPES = (IO.ANY,)
    FUNCTION = "wait"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"value": (IO.ANY,), "gate": ("STRING", {})}}

    def wait(self, value: Any, gate: str) -> tuple[Any]:
        end = time.monotonic() + _PATIENCE
        while not Path(gate).exists():
            management.throw_exception_if_processing_interrupted()
            if time.monotonic() > end:
                raise TimeoutError(f"nobody has opened {gate}")
            time.sleep(0.01)
        return (value,)


NODE_CLASS_MAPPINGS = {"WaitAtGate": WaitAtGate}
