"""File names that every file system takes, from names that may hold anything."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

LONGEST = 140  # bytes: what the strictest file systems in use take (255, or 143 where names are encrypted)
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)  # on Windows


def plain(name: str, longest: int = LONGEST) -> str:
    """Without characters that some file system refuses, and cut by bytes, before the suffix."""
    found = re.sub(r'[\x00-\x1f\x7f<>:"/\\|?*\ud800-\udfff]+', "_", name).strip(" .") or "_"
    return shortened(f"_{found}" if _RESERVED.match(found) else found, longest)


def shortened(name: str, longest: int, mark: str = "") -> str:
    """At most so many bytes of UTF-8, the suffix and a mark before it kept."""
    stem, suffix = name, PurePosixPath(name).suffix
    if len(suffix.encode()) > 20:
        suffix = ""
    stem = name[: len(name) - len(suffix)]
    room = longest - len((mark + suffix).encode())
    return stem.encode()[: max(room, 1)].decode("utf-8", "ignore").rstrip(" .") + mark + suffix


class Names:
    """Paths below a folder, no two alike, also where case does not count."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def unique(self, subfolder: str, name: str) -> PurePosixPath:
        """A place for a file that a server calls so, its subfolder kept."""
        steps = [plain(step) for step in re.split(r"[/\\]", subfolder) if step.strip(" .")]
        base = plain(name)
        number = 1
        while True:
            path = PurePosixPath(*steps, base if number == 1 else shortened(base, LONGEST, f" ({number})"))
            if str(path).casefold() not in self._taken:
                self._taken.add(str(path).casefold())
                return path
            number += 1


def relative(text: str) -> bool:
    """Whether a text is a plain relative file name: nothing absolute, no drive, no `..`."""
    steps: Iterable[str] = re.split(r"[/\\]", text)
    return (
        bool(text.strip())
        and not re.match(r"[/\\~]|[A-Za-z]:", text)
        and not re.search(r"[\x00-\x1f]", text)
        and all(step not in ("", ".", "..") and len(step.encode("utf-8", "replace")) <= 255 for step in steps)
    )
