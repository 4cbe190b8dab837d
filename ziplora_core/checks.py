"""Values that a user may have set to anything: refused with a sentence that names them."""

from __future__ import annotations

from collections.abc import Iterable

from .files import shown


def in_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # NaN is in no range
        raise ValueError(f"{name} is {shown(str(value), 40)}; expected a number from {low:g} to {high:g}")


def one_of(name: str, value: object, options: Iterable[str]) -> None:
    known = list(options)  # a list may be asked for what has no hash
    if value not in known:
        raise ValueError(f"{name} is '{shown(str(value), 40)}'; expected one of: {', '.join(known)}")
