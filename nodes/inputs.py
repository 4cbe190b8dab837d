"""Inputs that several nodes have, each with its own words."""

from __future__ import annotations

from typing import Any, TypeVar

import folder_paths
from comfy_api.v0_0_2 import io

NEW = "[None]"  # of continue_from, as the host's own Train LoRA calls it
_Input = TypeVar("_Input", bound=io.Input)


def connected(**sockets: Any) -> None:
    """Raises ValueError where a socket got a value in the place of a link: the host lets the API write any there."""
    for name, value in sockets.items():
        if value is None or isinstance(value, str | int | float | list | dict):
            raise ValueError(f"{name} is not connected; link a node's output to it")


def advanced(made: _Input) -> _Input:
    """The same input, out of sight until a user asks for more of them.

    Where the host's schema has no word for this, the frontend is told beside it. web/ziplora_advanced.js hides them
    where the frontend leaves them on the canvas.
    """
    if hasattr(made, "advanced"):
        made.advanced = True
    else:
        made.extra_dict["advanced"] = True
    return made


def seed(tooltip: str) -> io.Int.Input:
    """As the host's own seeds, but fixed from run to run."""
    return io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=False, tooltip=tooltip)


def training_steps(default: int, tooltip: str) -> io.Int.Input:
    return io.Int.Input("steps", default=default, min=1, max=100_000, tooltip=tooltip)


def training_rate(name: str, default: float, step: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=default, min=1e-8, max=1.0, step=step, round=False, tooltip=tooltip)


def batch_size(tooltip: str) -> io.Int.Input:
    return io.Int.Input("batch_size", default=1, min=1, max=64, tooltip=tooltip)


def rank(default: int, tooltip: str) -> io.Int.Input:
    return io.Int.Input("rank", default=default, min=1, max=1024, tooltip=tooltip)


def resolution() -> io.Int.Input:
    """Of the pictures that a node trains on."""
    return io.Int.Input(
        "resolution",
        default=1024,
        min=64,
        max=4096,
        step=8,
        tooltip="Side of a square bucket in pixels: what the model draws best, 1024 for SDXL.",
    )


def sample_every(tooltip: str) -> io.Int.Input:
    return io.Int.Input("sample_every", default=100, min=0, max=100_000, optional=True, tooltip=tooltip)


def save_every(tooltip: str) -> io.Int.Input:
    return io.Int.Input("save_every", default=250, min=0, max=100_000, optional=True, tooltip=tooltip)


def continue_from(tooltip: str) -> io.Combo.Input:
    """`file_to_continue` makes a name, or nothing, of it."""
    files = folder_paths.get_filename_list("loras")
    return io.Combo.Input("continue_from", options=[NEW, *files], default=NEW, optional=True, tooltip=tooltip)


def file_to_continue(chosen: str) -> str | None:
    return None if chosen == NEW else chosen
