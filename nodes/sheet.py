"""A sheet for a blind comparison, and its key."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_CELL, _GAP, _HEAD, _NUMBER, _FONT = 384, 8, 40, 48, 22
_HEADINGS = ("subject", "style", "left", "right")
_GROUND, _INK = "#ffffff", "#202024"


def sides(count_a: int, count_b: int, seed: int) -> list[bool]:
    """For each pair whether method A is on the left. Raises ValueError where there are not as many of each."""
    if count_a != count_b:
        raise ValueError(f"images_a holds {count_a} pictures, images_b {count_b}; expected as many of each")
    chosen = random.Random(seed)
    return [chosen.random() < 0.5 for _ in range(count_a)]


def draw(a: Tensor, b: Tensor, subject: Tensor, style: Tensor, a_is_left: Sequence[bool]) -> Tensor:
    """IMAGE (1, H, W, 3): a numbered row for each pair: subject, style, left, right. All IMAGE (N, H, W, 3) in 0..1."""
    rows = len(a_is_left)
    size = (_NUMBER + 4 * (_CELL + _GAP), _HEAD + rows * (_CELL + _GAP))
    page = Image.new("RGB", size, _GROUND)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(_FONT)
    for column, heading in enumerate(_HEADINGS):
        pen.text((_NUMBER + column * (_CELL + _GAP), 8), heading, fill=_INK, font=font)
    for row, left in enumerate(a_is_left):
        top = _HEAD + row * (_CELL + _GAP)
        pen.text((10, top + _CELL // 2), str(row + 1), fill=_INK, font=font)
        pair = (a[row], b[row]) if left else (b[row], a[row])
        for column, picture in enumerate((subject[0], style[0], *pair)):
            page.paste(_cell(picture), (_NUMBER + column * (_CELL + _GAP), top))
    return torch.from_numpy(np.asarray(page).astype(np.float32) / 255)[None]


def _cell(picture: Tensor) -> Image.Image:
    pixels = (picture[..., :3].clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    image = Image.fromarray(pixels)
    image.thumbnail((_CELL, _CELL), Image.Resampling.LANCZOS)
    if max(image.size) < _CELL:  # thumbnail only makes smaller
        factor = _CELL / max(image.size)
        image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)
    return image


def key(a_is_left: Sequence[bool], name_a: str, name_b: str, seed: int) -> str:
    """Which method is where, as JSON."""
    rows = [
        {"row": number, "left": name_a if left else name_b, "right": name_b if left else name_a}
        for number, left in enumerate(a_is_left, 1)
    ]
    return json.dumps({"seed": seed, "rows": rows}, indent=1, ensure_ascii=False)
