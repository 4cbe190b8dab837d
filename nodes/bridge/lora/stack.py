"""A LORA_STACK of other packs: which files, at which strengths, and what each is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from ....ziplora_core.files import LoRAFileError, shown
from .loras import STRENGTH, LoRASources, load_sources

ROLES = "subject, style"
_CONCEPTS = {"subject": "content", "style": "style", "other": "other"}  # role -> what its first LoRA is called
_ROLES = {concept: role for role, concept in _CONCEPTS.items()}
_NO_FILE = ("", "none")  # what stackers leave, in any case, in a slot that is not used; or nothing


@dataclass(frozen=True)
class Entry:
    """One LoRA of a stack: its name in the loras folder, the model's strength and the text encoder's."""

    name: str
    strength: float
    clip_strength: float


def entries(lora_stack: Any) -> list[Entry]:
    """The LoRAs of a stack, also those that are turned off. Raises ValueError, naming the place, for what is no such
    list."""
    if not isinstance(lora_stack, list | tuple):
        raise ValueError("lora_stack is no list of LoRAs; connect a LoRA stacker to it")
    stack = []
    for place, entry in enumerate(lora_stack, 1):
        if not isinstance(entry, list | tuple) or not 2 <= len(entry) <= 3:
            raise ValueError(
                f"lora_stack: place {place} is {shown(repr(entry), 60)}; expected a file, its model strength and its "
                "clip strength"
            )
        name, *strengths = entry
        if name is None or isinstance(name, str) and name.strip().lower() in _NO_FILE:
            continue
        if not isinstance(name, str) or not all(map(_is_number, strengths)):
            raise ValueError(
                f"lora_stack: place {place} is {shown(repr(entry), 60)}; expected a file's name and numbers from "
                f"{STRENGTH.low:g} to {STRENGTH.high:g}"
            )
        stack.append(Entry(name, float(strengths[0]), float(strengths[-1])))
    return stack


def _is_number(value: Any) -> bool:
    """Also one of numpy's, which are no int or float."""
    return isinstance(value, Real) and not isinstance(value, bool) and STRENGTH.holds(float(value))


def concepts(roles: str, count: int) -> list[str]:
    """A name for each LoRA of a stack: "content", "style", "other", with a number from its role's second one on.

    roles: with commas or lines between; those that are not named are other. Raises ValueError for an unknown role.
    """
    said = [role.strip().lower() for role in re.split(r"[,，\n]", roles) if role.strip()]
    said = [_ROLES.get(role, role) for role in said]
    for role in said:
        if role not in _CONCEPTS:
            raise ValueError(
                f"roles is '{shown(role, 40)}'; expected one of: {', '.join(_CONCEPTS)} for each LoRA, with commas "
                "between them"
            )
    names: list[str] = []
    for role in [*said[:count], *["other"] * (count - len(said))]:
        earlier = sum(re.sub(r" \d+$", "", name) == _CONCEPTS[role] for name in names)
        names.append(f"{_CONCEPTS[role]} {earlier + 1}" if earlier else _CONCEPTS[role])
    return names


def in_order(names: Sequence[str]) -> list[int]:
    """Places of a stack's LoRAs as nodes count them: the first subject, the first style, then as they stand."""
    return sorted(range(len(names)), key=lambda place: {"content": 0, "style": 1}.get(names[place], 2))


def load(lora_stack: Any, roles: str) -> LoRASources:
    """Read the files of a stack that do something; those that are turned off keep their role, so that turning one off
    renames no other. Raises ValueError for what is no stack, LoRAFileError for a file."""
    chosen = entries(lora_stack)
    names = concepts(roles, len(chosen))
    files = {names[p]: (chosen[p].name, chosen[p].strength, chosen[p].clip_strength) for p in in_order(names)}
    files = {concept: file for concept, file in files.items() if any(file[1:])}
    if not files:
        raise LoRAFileError("lora_stack holds no LoRA with a strength; choose a file in the stacker")
    return load_sources(files)
