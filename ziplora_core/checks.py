"""Values that a user may have set to anything: their ranges, and the sentence that refuses what lies outside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .files import shown


class Range(NamedTuple):
    """Smallest and largest value of a setting: a node's schema offers it, `check` holds everybody to it."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high  # NaN is in no range

    def check(self, name: str, value: float) -> None:
        """Raises ValueError, naming the setting, for a value outside."""
        if not self.holds(value):
            raise ValueError(f"{name} is {shown(str(value), 40)}; expected a number from {self.low:g} to {self.high:g}")


SEED = Range(0, 2**64 - 1)


def check_ranges(settings: Any, ranges: Mapping[str, Range]) -> None:
    """Raises ValueError for the first of the settings' fields that lies outside its range."""
    for name, bounds in ranges.items():
        bounds.check(name, getattr(settings, name))


def in_range(name: str, value: float, low: float, high: float) -> None:
    Range(low, high).check(name, value)


def one_of(name: str, value: object, options: Iterable[str]) -> None:
    known = list(options)  # a list may be asked for what has no hash
    if value not in known:
        raise ValueError(f"{name} is '{shown(str(value), 40)}'; expected one of: {', '.join(known)}")


def lines(text: str) -> list[str]:
    """The lines of a text that say something, without the blanks around them."""
    return [line.strip() for line in text.splitlines() if line.strip()]
