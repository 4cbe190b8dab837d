"""Techniques: styles that any picture can be put into by a fixed rule, so that each has an exact truth.

Each is a function of `Layers` and gives B x 3 x H x W in 0..1: batched, without chance, on any device. Patterns repeat
every 8 pixels (or a divisor), where the autoencoder's cells lie.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclasses.dataclass(frozen=True)
class Layers:
    """A composed picture. picture: B3HW, the object on its ground; alpha: B1HW, where the object is; ground: B311."""

    picture: Tensor
    alpha: Tensor
    ground: Tensor

    def on(self, color: str) -> Tensor:
        """The object on another plain ground."""
        return self.picture + (1 - self.alpha) * (rgb(color, self.picture) - self.ground)


def rgb(code: str, like: Tensor) -> Tensor:
    """'#rrggbb' as 1 x 3 x 1 x 1 in 0..1."""
    values = [int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return torch.tensor(values, device=like.device, dtype=like.dtype).view(1, 3, 1, 1)


def blend(low: Tensor, high: Tensor, share: Tensor) -> Tensor:
    return low + (high - low) * share


def brightness(picture: Tensor) -> Tensor:
    """Brightness, B1HW."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=picture.device, dtype=picture.dtype).view(1, 3, 1, 1)
    return (picture * weights).sum(1, keepdim=True)


def _blur(x: Tensor, sigma: float) -> Tensor:
    reach = max(1, round(2.5 * sigma))
    steps = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (steps / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, -1)
    x = F.conv2d(F.pad(x, (reach, reach, 0, 0), mode="replicate"), kernel.unsqueeze(2), groups=x.shape[1])
    return F.conv2d(F.pad(x, (0, 0, reach, reach), mode="replicate"), kernel.unsqueeze(3), groups=x.shape[1])


def outlines(layers: Layers, least: float = 0.10, soft: float = 0.16, sigma: float = 0.8) -> Tensor:
    """Where color or outline changes: B1HW in 0..1, lines about two pixels wide."""
    x = _blur(torch.cat([layers.on("#ffffff"), layers.alpha], dim=1), sigma)
    right = F.pad(x[..., :, 2:] - x[..., :, :-2], (1, 1, 0, 0))
    down = F.pad(x[..., 2:, :] - x[..., :-2, :], (0, 0, 1, 1))
    strength = (right.square() + down.square()).amax(1, keepdim=True).sqrt()
    return ((strength - least) / soft).clamp(0, 1)


def coordinates(like: Tensor) -> tuple[Tensor, Tensor]:
    """Columns and rows of the pixels, 1 x 1 x H x W."""
    height, width = like.shape[-2:]
    rows = torch.arange(height, device=like.device, dtype=like.dtype).view(1, 1, -1, 1).expand(1, 1, height, width)
    columns = torch.arange(width, device=like.device, dtype=like.dtype).view(1, 1, 1, -1).expand(1, 1, height, width)
    return columns, rows


@functools.lru_cache
def _grain(size: int, sigma: float, seed: int) -> Tensor:
    """A fixed texture of paper, 1 x 1 x size x size, about -1..1."""
    noise = torch.randn(1, 1, size, size, generator=torch.Generator().manual_seed(seed))
    noise = _blur(noise, sigma)
    return noise / noise.std() / 2


def _grain_like(like: Tensor, sigma: float, seed: int) -> Tensor:
    return _grain(like.shape[-1], sigma, seed).to(like)


def palette(light: Tensor, *codes: str) -> Tensor:
    """A palette of evenly spaced colors, from dark to light."""
    place = light.clamp(0, 1) * (len(codes) - 1)
    out = rgb(codes[0], light).expand(light.shape[0], -1, *light.shape[-2:])
    for i, code in enumerate(codes[1:]):
        out = blend(out, rgb(code, light), (place - i).clamp(0, 1))
    return out


def _toward(height: Tensor, reach: int) -> Tensor:
    """How much higher a place is than the one to its upper left: light from there."""
    before = F.pad(height, (reach, 0, reach, 0), mode="replicate")[..., : height.shape[-2], : height.shape[-1]]
    return height - before


def mosaic(x: Tensor, size: int) -> Tensor:
    return F.interpolate(F.avg_pool2d(x, size), scale_factor=size, mode="nearest")


# --- known to the base by name -------------------------------------------------------------------------------


def sketch(layers: Layers) -> Tensor:
    """Pencil lines on cream paper, with a little tone."""
    tone = 0.78 + 0.22 * brightness(layers.on("#ffffff"))
    return blend(rgb("#fbf6ea", tone) * tone, rgb("#35353d", tone), 0.9 * outlines(layers))


def neon(layers: Layers) -> Tensor:
    """Glowing lines in the object's own colors on black."""
    lines = outlines(layers)
    around = _blur(layers.picture * layers.alpha, 1.5)
    own = around / around.amax(1, keepdim=True).clamp(min=0.05)
    own = (own * 1.5 - 0.5).clamp(0, 1) + 0.12
    glow = _blur(lines * own, 3.0)
    return (rgb("#08080f", lines) + lines * own + 0.9 * glow).clamp(0, 1)


def blueprint(layers: Layers) -> Tensor:
    """White lines on a blue sheet with a grid."""
    columns, rows = coordinates(layers.picture)
    grid = ((columns % 16 == 0) | (rows % 16 == 0)).to(layers.picture.dtype)
    paper = blend(rgb("#1f4fa3", grid), rgb("#3f6dbd", grid), grid)
    paper = blend(paper, rgb("#2f62b8", grid), layers.alpha * 0.8 * (1 - brightness(layers.picture)))
    return blend(paper, rgb("#f2f6ff", grid), outlines(layers))


def pixel(layers: Layers) -> Tensor:
    """Squares of four pixels, in few colors."""
    return (mosaic(layers.picture, 4) * 15).round() / 15


def sepia(layers: Layers) -> Tensor:
    """Browns by brightness, as an old photograph, its edges a little darker."""
    browns = palette(brightness(layers.on("#ffffff")), "#2a170c", "#8a5a33", "#d9b98a", "#f7ead0")
    return browns * (1 - 0.4 * outlines(layers))


def sticker(layers: Layers) -> Tensor:
    """A white rim around the object, and a shadow under it."""
    wide = F.max_pool2d(layers.alpha, 9, stride=1, padding=4)
    rim = _blur(wide, 0.8)
    shadow = _blur(F.pad(wide, (2, 0, 4, 0))[..., : wide.shape[-2], : wide.shape[-1]], 2.0)
    under = layers.ground * (1 - 0.45 * shadow)
    inside = layers.on("#ffffff")
    return blend(under, inside, rim)


def thermal(layers: Layers) -> Tensor:
    """Heat colors by brightness; the ground is cold."""
    warm = layers.alpha * (0.18 + 0.82 * brightness(layers.on("#000000")))
    return palette(warm, "#0b0733", "#5b149c", "#c92c6d", "#f98a2b", "#fdf3a0")


def comic(layers: Layers) -> Tensor:
    """Few strong colors and black outlines, on the ground."""
    light = brightness(layers.picture)
    strong = (light + (layers.picture - light) * 1.5).clamp(0, 1)
    flat = (_blur(strong, 0.8) * 3).round() / 3
    thick = F.max_pool2d(outlines(layers, 0.16), 3, stride=1, padding=1)
    return blend(blend(layers.ground.expand_as(flat), flat, layers.alpha), rgb("#0d0d12", light), thick)


def negative(layers: Layers) -> Tensor:
    """Every color its opposite."""
    return 1 - layers.picture


# --- held back: styles to merge ------------------------------------------------------------------------------


def hatching(layers: Layers) -> Tensor:
    """Ink: the darker, the more diagonal lines, one way and then across."""
    dark = 1 - _blur(brightness(layers.on("#ffffff")), 1.0)
    columns, rows = coordinates(dark)
    ink = outlines(layers)
    for along, least in ((columns + rows, 0.12), (columns - rows, 0.5)):
        width = ((dark - least) * 5).clamp(0, 1) * 1.6
        away = ((along % 8) - 4).abs()
        ink = torch.maximum(ink, (width + 0.7 - away).clamp(0, 1) * (width > 0.05))
    return blend(rgb("#fdf8ec", dark), rgb("#14213a", dark), ink)


def halftone(layers: Layers) -> Tensor:
    """Dots on a slanted grid, larger where it is darker, blue on yellow."""
    dark = 1 - brightness(layers.on("#ffffff"))
    columns, rows = coordinates(dark)
    across, down = (columns % 8) - 3.5, (rows % 8) - 3.5
    first = across.square() + down.square()
    second = (across.abs() - 4).square() + (down.abs() - 4).square()
    distance = torch.minimum(first, second).sqrt()
    radius = 4.2 * dark.clamp(0, 1).sqrt()
    return blend(rgb("#ffe9a8", dark), rgb("#1b2f7a", dark), (radius - distance + 0.5).clamp(0, 1))


def crossstitch(layers: Layers) -> Tensor:
    """Crosses of thread in cells of four pixels, on linen."""
    columns, rows = coordinates(layers.picture)
    a, b = columns % 4, rows % 4
    cross = ((a == b) | (a + b == 3)).to(layers.picture.dtype)
    weave = 1 - 0.1 * ((a == 0) | (b == 0)).to(layers.picture.dtype)
    linen = rgb("#efe3c8", cross) * weave
    thread = mosaic(layers.on("#efe3c8"), 4) * (0.62 + 0.38 * cross)
    return blend(linen.expand_as(thread), thread, (mosaic(layers.alpha, 4) > 0.5).to(cross.dtype))


def cutpaper(layers: Layers) -> Tensor:
    """Sheets of paper in few colors, laid on each other, with shadows."""
    flat = (_blur(layers.picture, 1.6) * 4).round() / 4
    soft = 0.2 + 0.75 * flat
    light = brightness(soft)
    above = F.pad(light, (2, 0, 2, 0), mode="replicate")[..., : light.shape[-2], : light.shape[-1]]
    step = (_blur(above - light, 0.7) * 2).clamp(-0.3, 0.3)
    shadow = F.pad(layers.alpha, (4, 0, 5, 0))[..., : light.shape[-2], : light.shape[-1]]
    ground = rgb("#e8d9c3", light) * (1 - 0.5 * _blur(shadow, 1.5))
    return blend(ground, soft - step, _blur((layers.alpha > 0.5).to(light.dtype), 0.5)).clamp(0, 1)


def watercolor(layers: Layers) -> Tensor:
    """Pale washes that gather at their edges, on rough paper."""
    grain = _grain_like(layers.alpha, 2.5, 1)
    patches = _grain_like(layers.alpha, 6.0, 2)
    wash = _blur(layers.on("#ffffff"), 1.8)
    alpha = _blur(layers.alpha, 1.2)
    rim = (4 * alpha * (1 - alpha)).clamp(0, 1)
    strength = (0.62 + 0.22 * patches + 0.3 * rim + 0.08 * grain).clamp(0.2, 1)
    paper = rgb("#fbf8f0", grain) * (1 + 0.03 * grain)
    return (paper * (1 - strength * (1 - wash))).clamp(0, 1)


def chalk(layers: Layers) -> Tensor:
    """Chalk on a green board, rubbed on by its grain."""
    grain = _grain_like(layers.alpha, 2.5, 3)
    board = rgb("#27473a", grain) * (1 + 0.06 * _grain_like(layers.alpha, 5.0, 4))
    rubbed = (layers.alpha * (0.15 + 0.55 * brightness(layers.picture)) + 0.15 * grain * layers.alpha).clamp(0, 1)
    drawn = torch.maximum(0.75 * rubbed, outlines(layers) * (0.85 + 0.2 * grain)).clamp(0, 1)
    own = 0.55 + 0.45 * _blur(layers.on("#ffffff"), 1.5)
    return blend(board, own, drawn).clamp(0, 1)


def riso(layers: Layers) -> Tensor:
    """Two inks, pink and teal, printed a little beside each other."""
    white = layers.on("#ffffff")
    pink, teal = 1 - _blur(white[:, 1:2], 0.6), 1 - _blur(white[:, 0:1], 0.6)
    teal = F.pad(teal, (2, 0, 2, 0))[..., : teal.shape[-2], : teal.shape[-1]]
    paper = rgb("#f7f0e1", white)
    print_pink = blend(torch.ones_like(paper), rgb("#ff4c78", white), (pink * 1.25).clamp(0, 1))
    print_teal = blend(torch.ones_like(paper), rgb("#0f8a96", white), (teal * 1.25).clamp(0, 1))
    return paper * print_pink * print_teal


def gilded(layers: Layers) -> Tensor:
    """Gold by brightness on dark red, with a bright edge."""
    gold = palette(brightness(layers.picture), "#6b3f0a", "#b87a1c", "#eec25a", "#fff3c2")
    gold = blend(gold, rgb("#fff0b8", gold), 0.6 * outlines(layers))
    return blend(rgb("#56101f", gold).expand_as(gold), gold, layers.alpha)


def plaster(layers: Layers) -> Tensor:
    """A relief of white plaster, lit from the upper left; color is gone, brightness is height."""
    height = _blur(layers.alpha * (0.55 + 0.45 * brightness(layers.on("#ffffff"))), 1.4)
    slope = _toward(height, 3)
    shadow = _blur(F.pad(layers.alpha, (5, 0, 6, 0))[..., : height.shape[-2], : height.shape[-1]], 2.5)
    wall = rgb("#d9d6d0", height) * (1 - 0.35 * shadow * (1 - layers.alpha))
    relief = rgb("#efece6", height) * (0.9 + 0.1 * brightness(layers.on("#ffffff")))
    return (blend(wall, relief, layers.alpha) + slope).clamp(0, 1)


def gingerbread(layers: Layers) -> Tensor:
    """A baked brown body with lines of white icing, on mint."""
    crust = _blur(layers.alpha, 4.0)
    body = blend(rgb("#8a4a1c", crust), rgb("#c98343", crust), (crust * 2 - 1).clamp(0, 1))
    body = body * (0.8 + 0.2 * brightness(layers.on("#ffffff")))
    iced = blend(body, rgb("#fff8f0", crust), (_blur(outlines(layers, 0.14), 0.6) * 1.3).clamp(0, 1))
    return blend(rgb("#bfe8d4", crust), iced, _blur(F.max_pool2d(layers.alpha, 5, stride=1, padding=2), 0.6))


def glass(layers: Layers) -> Tensor:
    """Stained glass: colors lit from behind, in lead, before a blue window."""
    columns, rows = coordinates(layers.picture)
    middle = (layers.picture.shape[-1] - 1) / 2
    light = 1.15 - 0.5 * ((columns - middle).square() + (rows - middle).square()).sqrt() / middle
    gray = brightness(layers.on("#ffffff"))
    color = _blur((gray + (layers.on("#ffffff") - gray) * 2).clamp(0, 1), 1.5)
    lead = F.max_pool2d(outlines(layers, 0.2), 3, stride=1, padding=1)
    pane = blend(rgb("#1d3fae", gray), color, layers.alpha) * light
    return blend(pane, rgb("#15151c", gray), 0.95 * _blur(lead, 0.6)).clamp(0, 1)


def moonlight(layers: Layers) -> Tensor:
    """A night in blue: what is light shines cold, and the upper left edge most."""
    rim = (_toward(_blur(layers.alpha, 1.0), 3) * 2.2).clamp(0, 1)
    gray = brightness(layers.picture)
    own = blend(gray.expand_as(layers.picture), layers.picture, torch.full_like(gray, 0.3))
    night = rgb("#0c1838", gray) + own * rgb("#5f80d8", gray) * 0.85
    night = blend(rgb("#0a1128", gray), night, layers.alpha)
    return (night + rim * rgb("#cfe2ff", gray)).clamp(0, 1)


def popart(layers: Layers) -> Tensor:
    """Four loud inks by brightness, before pink."""
    ink = palette(_blur(brightness(layers.on("#ffffff")), 0.6), "#2b0a5c", "#d81e78", "#ff9d1e", "#fff04a")
    return blend(rgb("#ff7fc0", ink), ink, layers.alpha)


Technique = Callable[[Layers], Tensor]
BASE_TECHNIQUES: dict[str, Technique] = {
    f.__name__: f for f in (sketch, neon, blueprint, pixel, sepia, sticker, thermal, comic, negative)
}
NEW_TECHNIQUES: dict[str, Technique] = {
    f.__name__: f
    for f in (
        *(hatching, halftone, crossstitch, cutpaper, watercolor, chalk, riso, gilded),
        *(plaster, gingerbread, glass, moonlight, popart),
    )
}
TECHNIQUES: dict[str, Technique] = {**BASE_TECHNIQUES, **NEW_TECHNIQUES}
KEEP_GROUND = ("pixel", "sticker", "comic")  # the ground keeps its color there, so a prompt may name it
