"""Sheets of pictures with labels: for a blind comparison, with its key, and a strip of merges side by side."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .bridge.progress.lettering import broken, shortened
from .bridge.progress.lettering import font as font_of

_CELL, _GAP, _HEAD, _NUMBER, _FONT = 384, 8, 40, 48, 22
_HEADINGS = ("subject", "style", "left", "right")
_GROUND, _INK, _FAINT = "#ffffff", "#202024", "#60606a"
_LABEL, _LARGE = 50, 32  # of a strip: height of a line of text, and its font
_LARGEST, _LONGEST = 512, 16_000  # of a strip: side of a picture; of the whole, which WebP ends at 16,383


def sides(count_a: int, count_b: int, seed: int) -> list[bool]:
    """For each pair whether method A is on the left. Raises ValueError where there are not as many of each."""
    if count_a != count_b:
        raise ValueError(f"images_a holds {count_a} pictures, images_b {count_b}; expected as many of each")
    chosen = random.Random(seed)
    return [chosen.random() < 0.5 for _ in range(count_a)]


def draw(a: Tensor, b: Tensor, subject: Tensor, style: Tensor, a_is_left: Sequence[bool]) -> Tensor:
    """IMAGE (1, H, W, 3): a numbered row for each pair: subject, style, left, right. All IMAGE (N, H, W, 3) in 0..1."""
    rows = len(a_is_left)
    page, pen = _page(_NUMBER + 4 * (_CELL + _GAP), _HEAD + rows * (_CELL + _GAP))
    font = font_of(_FONT)
    for column, heading in enumerate(_HEADINGS):
        pen.text((_NUMBER + column * (_CELL + _GAP), 8), heading, fill=_INK, font=font)
    for row, left in enumerate(a_is_left):
        top = _HEAD + row * (_CELL + _GAP)
        pen.text((10, top + _CELL // 2), str(row + 1), fill=_INK, font=font)
        pair = (a[row], b[row]) if left else (b[row], a[row])
        for column, picture in enumerate((subject[0], style[0], *pair)):
            page.paste(_cell(picture, _CELL), (_NUMBER + column * (_CELL + _GAP), top))
    return _image(page)


def strip(headings: Sequence[str], prompts: Sequence[str], pictures: Tensor, said: Sequence[str] = ()) -> Tensor:
    """IMAGE (1, H, W, 3): a column below each heading, a row below each prompt; no side of it over 16,000 pixels.

    pictures: IMAGE (N, H, W, 3), row by row, of one size. Texts that are too long are shortened. said: lines above
    all, broken where they are too long; without prompts the strip is these alone.
    """
    columns, rows = len(headings), len(prompts)
    if not rows:
        return _image(_with_text(None, said, _GAP + columns * (_LARGEST + _GAP)))
    side = min(_LARGEST, (_LONGEST - _GAP) // columns - _GAP, (_LONGEST - _LABEL) // rows - _LABEL - _GAP)
    wide, high = _cell(pictures[0], side).size
    page, pen = _page(_GAP + columns * (wide + _GAP), _LABEL + rows * (_LABEL + high + _GAP))
    font = font_of(_LARGE)
    for column, heading in enumerate(headings):
        pen.text((_GAP + column * (wide + _GAP), 8), shortened(heading, wide, font), fill=_INK, font=font)
    for row, prompt in enumerate(prompts):
        top = _LABEL + row * (_LABEL + high + _GAP)
        pen.text((_GAP, top + 8), shortened(prompt, page.width - 2 * _GAP, font), fill=_FAINT, font=font)
        for column in range(columns):
            place = (_GAP + column * (wide + _GAP), top + _LABEL)
            page.paste(_cell(pictures[row * columns + column], side), place)
    return _image(_with_text(page, said, page.width) if said else page)


def _with_text(page: Image.Image | None, said: Sequence[str], width: int) -> Image.Image:
    """A page below lines of text."""
    font = font_of(_LARGE)
    lines = [part for line in said for part in broken(line, width - 2 * _GAP, font)]
    whole, pen = _page(width, _GAP + _LABEL * len(lines) + (page.height if page else 0))
    for number, line in enumerate(lines):
        pen.text((_GAP, _GAP + number * _LABEL), line, fill=_INK, font=font)
    if page:
        whole.paste(page, (0, whole.height - page.height))
    return whole


def _page(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    page = Image.new("RGB", (width, height), _GROUND)
    return page, ImageDraw.Draw(page)


def _image(page: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(page).astype(np.float32) / 255)[None]


def _cell(picture: Tensor, side: int) -> Image.Image:
    """A picture whose longer side is this."""
    pixels = (picture[..., :3].nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    if max(image.size) < side:  # thumbnail only makes smaller
        factor = side / max(image.size)
        image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)
    return image


def key(a_is_left: Sequence[bool], name_a: str, name_b: str, seed: int) -> str:
    """Which method is where, as JSON."""
    rows = [
        {"row": number, "left": name_a if left else name_b, "right": name_b if left else name_a}
        for number, left in enumerate(a_is_left, 1)
    ]
    return json.dumps({"seed": seed, "rows": rows}, indent=1, ensure_ascii=False)
