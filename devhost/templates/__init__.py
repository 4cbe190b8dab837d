"""The graphs that ship, described here and laid out as UI files by `python3 dev.py workflows`.

Each is a list of columns; nodes that do not fit below one another begin a new one. `words` has the placeholders that a
user replaces, `graph` the file's layout, `parts` what graphs have in common; the other modules describe graphs,
`blueprints` those that are put into others.
"""

from __future__ import annotations

from collections.abc import Callable

from . import rivals, sketches, trained, zipped
from .blueprints import BLUEPRINTS
from .graph import Graph

__all__ = ["BLUEPRINTS", "SKETCHES", "TEMPLATES"]

SKETCHES: tuple[Callable[[], Graph], ...] = (
    sketches.load_zipped,
    sketches.sparsify,
    sketches.direct_merge,
    sketches.stack,
)
TEMPLATES: tuple[Callable[[], Graph], ...] = (
    zipped.start,
    zipped.zipped_or_stacked,
    zipped.style_dial,
    zipped.every_step,
    zipped.with_pictures,
    zipped.export,
    trained.from_pictures,
    trained.unzip,
    zipped.several,
    zipped.check,
    trained.b_lora,
    zipped.scores,
    rivals.k_lora,
    rivals.two_scales,
    rivals.custom_diffusion,
    rivals.mix_of_show,
    rivals.embedding,
    rivals.split_concept,
)
