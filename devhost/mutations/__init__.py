"""Deliberate faults for `python3 dev.py mutants` (devhost/mutants.py), a module for each part of the pack."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One small fault.

    name: what is wrong then, in a few words; unique. file: from the root of the checkout. old: text that stands exactly
    once in the file, and new, what is put in its place. tests: paths, as pytest takes them, of what should notice, the
    fastest first. harmless: why nobody can see a difference, empty for most; such a mutant is listed, neither run nor
    counted.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    harmless: str = ""


def faults(file: str, tests: tuple[str, ...], *rows: tuple[str, ...]) -> list[Mutant]:
    """Mutants of one file. rows: (name, old, new), or with the reason why it is harmless as a fourth."""
    return [
        Mutant(f"{file.split('/')[-1].removesuffix('.py')}: {row[0]}", file, row[1], row[2], tests, *row[3:])
        for row in rows
    ]
