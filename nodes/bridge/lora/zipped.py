"""Zipped LoRAs, as they travel on the graph's sockets."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from ....ziplora_core.coefficients import Coefficients
from ....ziplora_core.files import shown
from ....ziplora_core.routing import Routing
from .fitting import FittedSet
from .loras import STRENGTH, LoRASources, role

ZIPPED = "zipped"


@dataclass(frozen=True)
class ZippedLoRA:
    """What travels on a ZIPPED_LORA socket: the LoRAs, their coefficients, and the dials already turned.

    dials: concept -> strength that is in the coefficients already, 1 where none is said. method, settings: how it came
    about, for the file that it may be saved to. routing: what mixed the rank axis of the files' LoRAs where `fitted`
    are routed ones, or their new downs where they are fused; the same for the file.
    """

    sources: LoRASources
    fitted: FittedSet = field(repr=False)
    coefficients: Coefficients = field(repr=False)
    dials: dict[str, float] = field(default_factory=dict)
    report: str = ""
    method: str = ZIPPED
    settings: dict[str, Any] = field(default_factory=dict)
    routing: Routing = field(default_factory=dict, repr=False)

    def dial(self, concept: str) -> float:
        return self.dials.get(concept, 1.0)

    def dialled(self, strengths: dict[str, float]) -> ZippedLoRA:
        """A copy with the dials multiplied by these strengths, by concept. Costs nothing.

        Raises ValueError for a concept that is not there.
        """
        coefficients = self.coefficients.scaled(**strengths)
        dials = {concept: self.dial(concept) * strengths.get(concept, 1.0) for concept in self.sources.by_concept}
        return replace(self, coefficients=coefficients, dials=dials)

    def clip_strength(self, concept: str) -> float:
        """`strength` of its text-encoder part, for which a stack may give another number."""
        apart = self.sources[concept].clip_strength
        return self.strength(concept) if apart is None else apart * self.dial(concept)

    def strength(self, concept: str) -> float:
        """Of what is not zipped but follows its LoRA: the file's strength times the dial."""
        return self.sources[concept].strength * self.dial(concept)


def sources_of(given: ZippedLoRA | LoRASources) -> LoRASources:
    """The LoRAs of a zipped set, at the strengths that its dials give them, or a pair as it is."""
    if not isinstance(given, ZippedLoRA):
        return given
    turned = {concept: dial for concept, dial in given.dials.items() if dial != 1}
    return given.sources.dialled(turned) if turned else given.sources


def _names(sources: LoRASources) -> dict[str, list[str]]:
    """Whom a name may mean, in small letters: a concept's before a file's, a whole path's before its last part's."""
    known: dict[str, list[str]] = {}
    every = sources.by_concept
    for names in (
        {concept: [concept, role(concept)] for concept in every},
        {concept: [source.name] for concept, source in every.items()},
        {concept: [os.path.basename(source.name)] for concept, source in every.items()},
        {concept: [os.path.splitext(os.path.basename(source.name))[0]] for concept, source in every.items()},
    ):
        level: dict[str, list[str]] = {}
        for concept, called in names.items():
            for name in dict.fromkeys(map(str.lower, called)):
                level.setdefault(name, []).append(concept)
        known = {**level, **known}
    return known


_ONE = re.compile(r"\s*(.+?)\s*[:：=]\s*([^\s,，;；]+)\s*(?:[,，;；]|$)")


def _said(text: str, known: Collection[str]) -> Iterator[tuple[str, float]]:
    """(name, number) of all lines. known: names in small letters: a file's may hold what else parts one from the next.

    Raises ValueError for what is none.
    """
    for line in filter(None, map(str.strip, text.splitlines())):
        whole = re.fullmatch(r"(.+)\s*[:：=]\s*([^\s,，;；]+)", line)
        if whole is not None and whole[1].strip().lower() in known:
            parts = [(whole[1].strip(), whole[2])]
        else:
            parts, place = [], 0
            while place < len(line):
                one = _ONE.match(line, place)
                parts.append((one[1], one[2]) if one else (line[place:], ""))
                place = one.end() if one else len(line)
        for name, number in parts:
            try:
                strength = float(number)
            except ValueError:
                raise ValueError(
                    f"strengths: '{shown(line, 60)}' is no line as 'style: 0.8', nor several of these with commas "
                    "between them"
                ) from None
            yield name, strength


def read_strengths(sources: LoRASources, text: str) -> dict[str, float]:
    """Concept -> strength, from lines `name: number`, or several of these on a line with commas between; a name is a
    concept's or its file's, with or without its ending.

    Raises ValueError for a line that says no such thing, an unknown name, one that is given twice, and a strength out
    of range.
    """
    known = _names(sources)
    strengths: dict[str, float] = {}
    for name, number in _said(text, known):
        meant = known.get(name.lower(), [])
        named = meant[0] if len(meant) == 1 else None
        if named is None or named in strengths:
            what = "names no LoRA of this set" if not meant else "stands there twice"
            if len(meant) > 1:
                what = f"may be {' or '.join(meant)}"
            raise ValueError(f"strengths: '{shown(name, 60)}' {what}; there are: {', '.join(sources.by_concept)}")
        STRENGTH.check(f"strengths: {named}", number)
        strengths[named] = number
    return strengths
