"""The record of a training-free merge, which node, files, exports and benchmarks read."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..coefficients import Coefficients
from ..lora_set import LoRASet, is_pair

Merged = tuple[LoRASet, Coefficients]


def number(settings: Mapping[str, Any], name: str, default: float, least: float, most: float) -> float:
    """A setting of a file. Raises ValueError for one that is no finite number from `least` to `most`."""
    value = settings.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r:.40}; expected a finite number")
    if not least <= value <= most:
        raise ValueError(f"{name} is {value!r:.40}; expected a number from {least:g} to {most:g}")
    return value


def as_it_is(loras: LoRASet, settings: Mapping[str, Any]) -> LoRASet:
    return loras


@dataclass(frozen=True)
class Method:
    """A training-free merge, computed from the LoRAs' factors.

    name: in the node's menu and in files, never to be changed. words: the menu's tooltip. merge: a set of LoRAs -> the
    set that the coefficients belong to, and these. settings: what a file says beside the name. prepared: from the
    files' own set and such settings, the set that saved coefficients belong to. for_a_pair: what it does to one LoRA is
    not what it does to another, so that it takes one content and one style LoRA. sdxl_alone: it knows SDXL's blocks.
    called: what exported files call such a merge, "Merge by NAME" where empty. told: sentences for a report, from the
    set before and after. needs: bytes that the merged set will hold beside the files, 0 for next to nothing.

    One LoRA alone comes out as it is.
    """

    name: str
    words: str
    merge: Callable[[LoRASet], Merged]
    settings: Mapping[str, Any] = field(default_factory=dict)
    prepared: Callable[[LoRASet, Mapping[str, Any]], LoRASet] = as_it_is
    for_a_pair: bool = False
    sdxl_alone: bool = False
    called: str = ""
    told: Callable[[LoRASet, LoRASet], list[str]] = lambda before, after: []
    needs: Callable[[LoRASet], int] = lambda loras: 0

    @property
    def title(self) -> str:
        return self.called or f"Merge by {self.name}"

    def __call__(self, loras: LoRASet) -> Merged:
        """The merge. Raises ValueError as `check` does, and for a set that has not what the method needs."""
        self.check(loras.concepts)
        return (loras, Coefficients.ones(loras)) if len(loras.concepts) == 1 else self.merge(loras)

    def check(self, concepts: Collection[str], others: Iterable[Method] = ()) -> None:
        """Raises ValueError where the method is for a content and a style LoRA, and the concepts are others.

        others: to be chosen from, those that take any.
        """
        if self.for_a_pair and not is_pair(concepts):
            any_number = " or ".join(other.name for other in others if not other.for_a_pair)
            raise ValueError(
                f"{self.name} merges one content and one style LoRA; found {len(concepts)}: {', '.join(concepts)}"
                + (f". Choose {any_number}, which take any" if any_number else "")
            )
