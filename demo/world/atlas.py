"""Every subject of every set as a cut-out, drawn once into one file of a few megabytes.

A cut-out is RGBA, 128 x 128, its longer side 120 pixels. Scenes (`scenes.py`) are composed from these on any device,
so the atlas is all the data that a training needs to take along.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .sets import CACHE, SETS, drawer, fetch, svg
from .subjects import ICONS, LEFT_OUT

SIZE = 128
LONGER = 120  # pixels of a cut-out's longer side
DRAWN = 256  # pixels an SVG is drawn at before it is cut out
PATH = CACHE / "atlas.safetensors"

Key = tuple[str, str]  # (subject, set)


@dataclasses.dataclass(frozen=True)
class Atlas:
    """keys: (subject, set) per cut-out; pictures: N x 4 x 128 x 128 bytes, color not multiplied by alpha."""

    keys: list[Key]
    pictures: Tensor
    digest: str  # of the file's content: which data a training saw

    def __post_init__(self) -> None:
        object.__setattr__(self, "number", {key: i for i, key in enumerate(self.keys)})

    number: dict[Key, int] = dataclasses.field(init=False, repr=False)

    def sets_of(self, subject: str) -> list[str]:
        """Words of the sets that have the subject, in the order of `SETS`."""
        return [word for word in SETS if (subject, word) in self.number]

    def find(self, keys: Iterable[Key], device: str | torch.device = "cpu") -> Tensor:
        """B x 4 x 128 x 128 in 0..1, on the device. KeyError where a set lacks a subject."""
        return self.pictures[[self.number[key] for key in keys]].to(device).float() / 255


def cut_out(drawn: bytes) -> Image.Image:
    """A drawn PNG, cut to what is not transparent and fitted into the cut-out's square."""
    picture = Image.open(io.BytesIO(drawn)).convert("RGBA")
    box = picture.getchannel("A").point(lambda a: 255 if a > 12 else 0).getbbox() or (0, 0, *picture.size)
    picture = picture.crop(box).convert("RGBa")
    scale = LONGER / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    fitted = picture.resize((width, height), Image.Resampling.LANCZOS).convert("RGBA")
    square = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
    square.paste(fitted, ((SIZE - width) // 2, (SIZE - height) // 2))
    return square


def _png(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=True)
    return out.getvalue()


def draw(path: Path = PATH, subjects: dict[str, str] | None = None) -> None:
    """Fetches the sets, draws every subject in every set that has it, writes the atlas."""
    fetch()
    resvg = drawer()
    keys, parts = [], []
    for subject, icon in (subjects or ICONS).items():
        for word in SETS:
            text = None if (subject, word) in LEFT_OUT else svg(word, icon)
            if text is not None:
                keys.append((subject, word))
                parts.append(_png(cut_out(bytes(resvg.svg_to_bytes(svg_string=text, width=DRAWN, height=DRAWN)))))
    _write(path, keys, parts)


def write_part(whole: Atlas, keys: Sequence[Key], path: Path) -> None:
    """An atlas of some of the drawings, as it ships with a miniature."""
    pictures = (whole.find(keys) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    _write(path, keys, [_png(Image.fromarray(picture)) for picture in pictures])


def _write(path: Path, keys: Sequence[Key], parts: Sequence[bytes]) -> None:
    ends = np.cumsum([len(part) for part in parts])
    content = {"png": torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8), "ends": torch.from_numpy(ends)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    save_file(content, temporary, {"keys": json.dumps(keys)})
    temporary.replace(path)


def load(path: Path = PATH) -> Atlas:
    """Reads an atlas. FileNotFoundError where there is none: `python -m demo.training.train draw` makes it."""
    if not path.is_file():
        raise FileNotFoundError(f"no atlas at {path}: draw it with `python3 dev.py run -m demo.training.train draw`")
    with safe_open(path, framework="pt") as file:
        keys = [(subject, word) for subject, word in json.loads(file.metadata()["keys"])]
        png, ends = file.get_tensor("png").numpy(), file.get_tensor("ends").tolist()
    digest = hashlib.sha256(json.dumps(keys).encode() + png.tobytes()).hexdigest()
    pictures = [np.array(Image.open(io.BytesIO(png[a:b].tobytes()))) for a, b in zip([0, *ends], ends, strict=False)]
    return Atlas(keys, torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(), digest)


def image(picture: Tensor) -> Image.Image:
    """3HW in 0..1."""
    return Image.fromarray((picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def sheet(pictures: Sequence[Tensor] | Tensor, columns: int) -> Image.Image:
    """3HW pictures in 0..1 side by side."""
    rows = -(-len(pictures) // columns)
    height, width = pictures[0].shape[-2:]
    out = Image.new("RGB", (columns * (width + 2), rows * (height + 2)), "white")
    for i, picture in enumerate(pictures):
        out.paste(image(picture), ((i % columns) * (width + 2), (i // columns) * (height + 2)))
    return out
