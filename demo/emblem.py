"""The pack's icon and banner, which the registry shows: two LoRAs as the sides of a zip.

    python3 dev.py run demo/emblem.py

writes docs/icon.png (400 x 400) and docs/banner.jpg (1260 x 540). Neither is in the archive: pyproject.toml has their
addresses.
"""

from __future__ import annotations

import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

DOCS = Path(__file__).resolve().parent.parent / "docs"
ICON, BANNER = DOCS / "icon.png", DOCS / "banner.jpg"
SIDE, WIDTH, HEIGHT = 400, 1260, 540
FINE = 4  # drawn larger, then made smaller: smooth edges

NIGHT, SUBJECT, STYLE, METAL, TEXT = "#16181d", "#4aa8ff", "#ffae3d", "#e8eaf0", "#c3c8d4"
TEETH = 13
MEETING = 0.54  # of the height: where both sides come together


def _sides(height: float) -> float:
    """Half the gap between both sides at a height from 0 (top) to 1, in parts of the zip's length."""
    return 0.0 if height >= MEETING else 0.27 * math.sin((MEETING - height) / MEETING * math.pi / 2) ** 1.6


def zip_picture(side: int) -> Image.Image:
    """RGBA, side x side: open above, closed below."""
    size = side * FINE
    image = Image.new("RGBA", (size, size))
    draw = ImageDraw.Draw(image)
    margin, length = 0.1 * size, 0.8 * size
    heights = [place / 200 for place in range(201)]
    for sign, color in ((-1, SUBJECT), (1, STYLE)):
        edge = [(size / 2 + sign * _sides(h) * length, margin + h * length) for h in heights]
        outer = [(x + sign * 0.19 * length, y) for x, y in edge]
        draw.polygon([*edge, *reversed(outer)], fill=color)
    for tooth in range(TEETH):
        height = (tooth + 0.5) / TEETH
        sign = -1 if tooth % 2 else 1
        x, y = size / 2 + sign * _sides(height) * length, margin + height * length
        wide, high = 0.085 * length, 0.023 * length
        left, right = (x - 0.5 * wide, x + wide) if sign > 0 else (x - wide, x + 0.5 * wide)
        draw.rounded_rectangle((left, y - high, right, y + high), radius=high, fill=METAL)
    x, y, wide = size / 2, margin + MEETING * length, 0.085 * length
    draw.rounded_rectangle((x - wide, y - 1.3 * wide, x + wide, y + 0.8 * wide), radius=0.5 * wide, fill=METAL)
    pull = (x - 0.45 * wide, y + 0.2 * wide, x + 0.45 * wide, y + 2.9 * wide)
    draw.rounded_rectangle(pull, radius=0.45 * wide, fill=METAL, outline=NIGHT, width=round(0.16 * wide))
    return image.resize((side, side), Image.Resampling.LANCZOS)


def icon() -> Image.Image:
    """RGBA, 400 x 400: the zip on a rounded square."""
    mask = Image.new("L", (SIDE * FINE, SIDE * FINE))
    box = (0, 0, SIDE * FINE - 1, SIDE * FINE - 1)
    ImageDraw.Draw(mask).rounded_rectangle(box, radius=SIDE * FINE // 6, fill=255)
    image = Image.new("RGBA", (SIDE, SIDE))
    image.paste(NIGHT, mask=mask.resize((SIDE, SIDE), Image.Resampling.LANCZOS))
    image.alpha_composite(zip_picture(SIDE))
    return image


def banner() -> Image.Image:
    """RGB, 1260 x 540 (21 : 9): the zip, the name, and what it does."""
    image = Image.new("RGBA", (WIDTH, HEIGHT), NIGHT)
    image.alpha_composite(zip_picture(460), (60, 40))
    draw = ImageDraw.Draw(image)
    draw.text((560, 130), "ZipLoRA", METAL, ImageFont.load_default(124))
    for place, (words, color) in enumerate(
        (("a subject LoRA", SUBJECT), ("and a style LoRA", STYLE), ("merged into one", TEXT))
    ):
        draw.text((566, 296 + 50 * place), words, color, ImageFont.load_default(38))
    return image.convert("RGB")


def main() -> None:
    icon().quantize(64).save(ICON, optimize=True)
    banner().save(BANNER, quality=85, optimize=True)
    for path in (ICON, BANNER):
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
