"""Tables of a small user study with pictures to vote on, and what its page's key says."""

from __future__ import annotations

import base64
import csv
import json
import re
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

METHODS = ("zipped", "stacked", "K-LoRA")


def draw(path: Path, value: int, told: str = "") -> Path:
    """A picture of one color, with a text in it as ComfyUI writes its workflow."""
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngInfo()
    info.add_text("workflow", told)
    Image.new("RGB", (40, 24), (value, 255 - value, 128)).save(path, pnginfo=info)
    return path


def table(folder: Path, pairs: int = 4, **changed: Any) -> Path:
    """A table of so many subjects in two styles, with files named after their methods."""
    columns = ["subject", "style", "subject_picture", "style_picture", "prompt", *METHODS]
    rows = []
    for at in range(pairs):
        for style in ("neon", "ink"):
            name = f"dog {at}"
            row = {"subject": name, "style": style, "prompt": f"{name} in {style}"}
            row["subject_picture"] = draw(folder / f"{name}.png", at).name
            row["style_picture"] = draw(folder / f"{style}.png", 90 + len(style)).name
            for number, method in enumerate(METHODS):
                value = 10 * at + 3 * number + len(style)
                row[method] = str(draw(folder / method / f"{name}_{style}.png", value, method).relative_to(folder))
            rows.append({**row, **changed})
    path = folder / "pairs.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


def key(page: str) -> dict[str, Any]:
    """What a page knows: methods, and the questions in its order."""
    (found,) = re.findall(r'<script type="text/plain" id="key">([^<]*)</script>', page)
    said: dict[str, Any] = json.loads(base64.b64decode(found))
    return said
