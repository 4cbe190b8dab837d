"""The graphs that ship beside `ziplora_sdxl`, described here and laid out as UI files by `python3 dev.py workflows`.

Each is a list of columns; nodes that do not fit below one another begin a new one. `words` has the placeholders that a
user replaces, `graph` the file's layout, `parts` what graphs have in common; the other modules describe graphs.
"""

from __future__ import annotations

from collections.abc import Callable

from . import sketches, trained, zipped
from .graph import Graph

SKETCHES: tuple[Callable[[], Graph], ...] = (sketches.load_zipped, sketches.sparsify, sketches.direct_merge)
TEMPLATES: tuple[Callable[[], Graph], ...] = (
    zipped.start,
    zipped.zipped_or_stacked,
    zipped.no_pictures,
    zipped.style_strength,
    zipped.each_alone,
    zipped.new_contexts,
    zipped.against_direct,
    zipped.export,
    zipped.scores,
    trained.from_pictures,
    trained.unzip,
    trained.b_lora,
)
