"""The README's picture: one row for each way to draw, one column for each pair and noise."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL, GAP, PAIR_GAP, LABELS, HEADER, MARGIN, CAPTION = 160, 6, 22, 250, 62, 18, 36
GROUND, INK, FAINT = "#ffffff", "#1b1f24", "#5b6470"


@dataclasses.dataclass(frozen=True)
class Row:
    """A label, a smaller line below it, and the pictures of each pair (uint8, height x width x 3)."""

    label: str
    note: str
    pictures: Sequence[Sequence[np.ndarray]]


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _cell(picture: np.ndarray, size: int = CELL) -> Image.Image:
    return Image.fromarray(picture).resize((size, size), Image.Resampling.LANCZOS)


def comparison(headers: Sequence[tuple[str, str]], rows: Sequence[Row]) -> Image.Image:
    """headers: for each pair, two lines. Every row has as many pictures for each pair as the first."""
    counts = [len(pictures) for pictures in rows[0].pictures]
    lefts, x = [], MARGIN + LABELS
    for count in counts:
        lefts.append(x)
        x += count * (CELL + GAP) - GAP + PAIR_GAP
    width = x - PAIR_GAP + MARGIN
    height = MARGIN + HEADER + len(rows) * (CELL + GAP) - GAP + MARGIN
    image = Image.new("RGB", (width, height), GROUND)
    draw = ImageDraw.Draw(image)
    for left, (first, second) in zip(lefts, headers, strict=True):
        draw.text((left, MARGIN), first, fill=INK, font=_font(20))
        draw.text((left, MARGIN + 28), second, fill=FAINT, font=_font(15))
    for number, row in enumerate(rows):
        top = MARGIN + HEADER + number * (CELL + GAP)
        draw.text((MARGIN, top + CELL // 2 - 30), row.label, fill=INK, font=_font(20))
        draw.multiline_text((MARGIN, top + CELL // 2), row.note, fill=FAINT, font=_font(15), spacing=5)
        for left, pictures in zip(lefts, row.pictures, strict=True):
            for column, picture in enumerate(pictures):
                image.paste(_cell(picture), (left + column * (CELL + GAP), top))
    return image


def sheet(pictures: Sequence[np.ndarray], columns: int = 8) -> Image.Image:
    """Every picture at its own size, in rows."""
    height, width = pictures[0].shape[:2]
    columns = min(columns, len(pictures))
    lines = -(-len(pictures) // columns)
    image = Image.new("RGB", (columns * (width + GAP) - GAP, lines * (height + GAP) - GAP), GROUND)
    for number, picture in enumerate(pictures):
        place = (number % columns * (width + GAP), number // columns * (height + GAP))
        image.paste(Image.fromarray(picture), place)
    return image


def square(pictures: Sequence[np.ndarray], size: int = 200) -> Image.Image:
    """Four pictures in a square: the template browser's thumbnail."""
    whole = 2 * size + GAP
    image = Image.new("RGB", (whole, whole), GROUND)
    for number, picture in enumerate(pictures):
        image.paste(_cell(picture, size), (number % 2 * (size + GAP), number // 2 * (size + GAP)))
    return image


def thumbnail(picture: np.ndarray, caption: str, side: int = 320) -> Image.Image:
    """A square of so many pixels: a picture of any shape, whole, and a caption of one line below it."""
    image, whole = Image.fromarray(picture), Image.new("RGB", (side, side), GROUND)
    room = side - CAPTION
    factor = min(side / image.width, room / image.height)
    image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)
    whole.paste(image, ((side - image.width) // 2, (room - image.height) // 2))
    ImageDraw.Draw(whole).text((side // 2, room + CAPTION // 2), caption, fill=INK, font=_font(20), anchor="mm")
    return whole


def write(image: Image.Image, path: Path, quality: int = 90) -> Path:
    """Write a picture whole or not at all. quality: of a JPG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    as_jpeg = {"quality": quality, "optimize": True, "progressive": True} if path.suffix == ".jpg" else {}
    image.save(buffer, "JPEG" if as_jpeg else "PNG", **as_jpeg)
    temporary = path.with_suffix(path.suffix + ".part")
    temporary.write_bytes(buffer.getvalue())
    os.replace(temporary, path)
    return path
