"""Inputs that several nodes have, each with its own words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import folder_paths
from comfy_api.v0_0_2 import io

from ..ziplora_core import solver, training
from ..ziplora_core.checks import SEED, Range
from .bridge.training.concept import CLASS_COUNT
from .bridge.training.pictures import RESOLUTION
from .bridge.training.run import INTERVAL

NEW = "[None]"  # of inputs whose file may be left out, as the host's own Train LoRA calls it
_NOT_CONNECTED = object()  # None stands for what is connected and not made yet
SAMPLE_EVERY, SAVE_EVERY = 100, 250  # steps

Settings = type[solver.Settings] | type[training.Settings]
_Input = TypeVar("_Input", bound=io.Input)
PROMPTS = "\n".join(
    f"a {kind} of a *"
    for kind in ("photo", "close-up photo", "bright photo", "dark photo", "cropped photo", "rendering", "good picture")
)


def connected(**sockets: Any) -> None:
    """Raises ValueError where a socket got a value in the place of a link: the host lets the API write any there."""
    for name, value in sockets.items():
        if value is None or isinstance(value, str | int | float | list | dict):
            raise ValueError(f"{name} is not connected; link a node's output to it")


def not_made(names: Iterable[str], given: Mapping[str, Any]) -> list[str]:
    """Of lazy inputs those that are connected and not made yet, for `check_lazy_status`."""
    return [name for name in names if given.get(name, _NOT_CONNECTED) is None]


def span(bounds: Range) -> dict[str, Any]:
    """A range, as an input's options."""
    return {"min": bounds.low, "max": bounds.high}


def setting(settings: Settings, name: str) -> dict[str, Any]:
    """Default and range of one of the core's settings, as an input's options."""
    return {"default": getattr(settings, name), **span(settings.ranges[name])}


def whole(settings: Settings, name: str, tooltip: str) -> io.Int.Input:
    """A setting of the core that is a whole number, under its own name."""
    return io.Int.Input(name, **setting(settings, name), tooltip=tooltip)


def fraction(settings: Settings, name: str, step: float, tooltip: str, **options: Any) -> io.Float.Input:
    """A setting of the core that may be any number, under its own name; not rounded to `step`."""
    return io.Float.Input(name, **setting(settings, name), step=step, round=False, tooltip=tooltip, **options)


def advanced(given: _Input) -> _Input:
    """The same input, out of sight until a user asks for more of them.

    Where the host's schema has no word for this, the frontend is told beside it. web/ziplora_advanced.js hides them
    where the frontend leaves them on the canvas.
    """
    if hasattr(given, "advanced"):
        given.advanced = True
    else:
        given.extra_dict["advanced"] = True
    return given


def of_lists(lists: Mapping[str, list[Any]], *texts: str) -> dict[str, Any]:
    """One value for each input of a node that takes lists: the first, or of these texts all, a line or more each."""
    return {name: "\n".join(values) if name in texts else values[0] for name, values in lists.items()}


def seed(tooltip: str) -> io.Int.Input:
    """As the host's own seeds, but fixed from run to run."""
    return io.Int.Input("seed", default=0, **span(SEED), control_after_generate=False, tooltip=tooltip)


def resolution(default: int) -> io.Int.Input:
    """Of the pictures that a node trains on."""
    return io.Int.Input(
        "resolution",
        default=default,
        **span(RESOLUTION),
        step=8,
        tooltip="Side of a square picture in pixels; others are scaled to about as many pixels in all. What the model "
        "draws best: 1024 for SDXL.",
    )


def concept(word: str) -> list[io.Input]:
    """Pictures, captions, and the word that is to be learned from them."""
    return [
        io.Image.Input(
            "images",
            tooltip="One to five pictures of the subject or in the style, of any sizes: a batch, or a list.",
        ),
        io.String.Input(
            "prompt",
            multiline=True,
            default=PROMPTS,
            tooltip="Captions, with the word in it; each line is used with each picture. "
            "For a style: 'a painting in the style of *'.",
        ),
        io.String.Input("word", default=word, tooltip="What stands for the concept in these prompts, and only there."),
    ]


def sample_every(
    tooltip: str = "Draw a rough sample on the node every so many steps (40 passes each); 0 for never.",
) -> io.Int.Input:
    return io.Int.Input("sample_every", default=SAMPLE_EVERY, **span(INTERVAL), optional=True, tooltip=tooltip)


def save_every(
    tooltip: str = "Write the file every so many steps too; 0 for only at the end. An interrupt writes it as well.",
) -> io.Int.Input:
    return io.Int.Input("save_every", default=SAVE_EVERY, **span(INTERVAL), optional=True, tooltip=tooltip)


def class_count(default: int) -> io.Int.Input:
    return io.Int.Input(
        "class_count",
        default=default,
        **span(CLASS_COUNT),
        optional=True,
        tooltip="How many class pictures the base model draws.",
    )


def prior_weight(settings: Settings) -> io.Float.Input:
    return io.Float.Input(
        "prior_weight",
        **setting(settings, "prior_weight"),
        step=0.1,
        optional=True,
        tooltip="Weight of the class pictures' loss.",
    )


def strength(name: str, tooltip: str, **options: Any) -> io.Float.Input:
    """Of a LoRA or a merge, as the host's LoRA loader has it, in a range that a slider can show."""
    return io.Float.Input(name, default=1.0, min=-10.0, max=10.0, step=0.05, tooltip=tooltip, **options)


def choice(name: str, options: Iterable[str], tooltip: str, default: str | None = None) -> io.Combo.Input:
    """The first of its options where no default is said; optional, so that graphs saved without it still run."""
    names = list(options)
    return io.Combo.Input(name, options=names, default=default or names[0], optional=True, tooltip=tooltip)


def continue_from(tooltip: str) -> io.Combo.Input:
    """`file_to_continue` makes a name, or nothing, of it."""
    files = folder_paths.get_filename_list("loras")
    return io.Combo.Input("continue_from", options=[NEW, *files], default=NEW, optional=True, tooltip=tooltip)


def file_to_continue(chosen: str) -> str | None:
    return None if chosen == NEW else chosen
