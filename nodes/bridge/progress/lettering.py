"""Text on pictures: Pillow's own font, and lines that fit a width."""

from __future__ import annotations

import bisect
import math

from PIL import ImageFont

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
_MORE = "..."


def font(size: int) -> Font:
    """Pillow's own in a size in pixels; small where this Pillow has one size only."""
    try:
        return ImageFont.load_default(size)
    except (TypeError, ImportError):
        return ImageFont.load_default()


def broken(line: str, width: int, font: Font) -> list[str]:
    """A line between its words, in parts of at most so many pixels; a word alone may be wider."""
    parts: list[str] = []
    for word in line.split():
        longer = f"{parts[-1]} {word}" if parts else word
        if parts and font.getlength(longer) <= width:
            parts[-1] = longer
        else:
            parts.append(word)
    return parts


def shortened(line: str, width: int, font: Font) -> str:
    """A line of at most so many pixels, with dots for what is left out of its end."""
    if isinstance(font, ImageFont.ImageFont):  # which raises for what it has no letter for
        line = line.encode("latin-1", "replace").decode("latin-1")
    if font.getlength(line) <= width:
        return line

    def cut(letters: int) -> str:
        return line[:letters].rstrip() + _MORE

    fit = bisect.bisect_right(range(len(line)), width, key=lambda letters: math.ceil(font.getlength(cut(letters))))
    return cut(max(fit - 1, 0))
