"""The miniature's world: one object per picture, drawn from signed distance fields.

Everything is described by a `Scene` (what is drawn, where, in which style) and drawn by `render`, which is
pure torch, batched, antialiased and deterministic: the same scene always gives the same picture. Because a
subject can be drawn in any style, every merge of a subject LoRA with a style LoRA has a ground truth.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SIZE = 128
HALF = SIZE / 2

RGB = tuple[float, float, float]


def rgb(code: str) -> RGB:
    """'#rrggbb' as three floats in 0..1."""
    return tuple(int(code[i : i + 2], 16) / 255 for i in (1, 3, 5))  # type: ignore[return-value]


COLOURS: dict[str, RGB] = {
    "red": rgb("#e02b35"),
    "orange": rgb("#f5891d"),
    "yellow": rgb("#f7d02c"),
    "green": rgb("#2fa84f"),
    "blue": rgb("#2a5bd7"),
    "purple": rgb("#8a35c9"),
}


# --- signed distances, in units of the object's own frame (y points down) ---------------------------------


def _box(x: Tensor, y: Tensor, hx: float, hy: float) -> Tensor:
    qx, qy = x.abs() - hx, y.abs() - hy
    outside = torch.hypot(qx.clamp(min=0), qy.clamp(min=0))
    return outside + torch.maximum(qx, qy).clamp(max=0)


def _polygon(x: Tensor, y: Tensor, points: Sequence[tuple[float, float]]) -> Tensor:
    """Exact distance to a simple polygon; the sign comes from counting edge crossings."""
    nearest = torch.full_like(x, 1e9)
    inside = torch.zeros_like(x, dtype=torch.bool)
    for (ax, ay), (bx, by) in zip(points, [*points[1:], points[0]], strict=True):
        ex, ey = bx - ax, by - ay
        wx, wy = x - ax, y - ay
        t = ((wx * ex + wy * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        nearest = torch.minimum(nearest, (wx - t * ex) ** 2 + (wy - t * ey) ** 2)
        if ey != 0:
            crosses = ((y >= ay) != (y >= by)) & (x < ax + ex * (y - ay) / ey)
            inside = inside ^ crosses
    distance = nearest.sqrt()
    return torch.where(inside, -distance, distance)


def _star_points(count: int = 5, outer: float = 1.02, inner: float = 0.44) -> list[tuple[float, float]]:
    points = []
    for i in range(2 * count):
        radius = outer if i % 2 == 0 else inner
        angle = math.pi * i / count - math.pi / 2
        points.append((radius * math.cos(angle), radius * math.sin(angle) + 0.06))
    return points


def _heart(x: Tensor, y: Tensor) -> Tensor:
    left = torch.hypot(x + 0.45, y + 0.32) - 0.5
    right = torch.hypot(x - 0.45, y + 0.32) - 0.5
    tip = _polygon(x, y, [(-0.855, -0.03), (0.0, -0.55), (0.855, -0.03), (0.0, 0.95)])
    return torch.minimum(torch.minimum(left, right), tip)


def _moon(x: Tensor, y: Tensor) -> Tensor:
    disc = torch.hypot(x, y) - 0.95
    bite = torch.hypot(x - 0.5, y + 0.12) - 0.72
    return torch.maximum(disc, -bite)


Distance = Callable[[Tensor, Tensor], Tensor]

PRIMITIVES: dict[str, Distance] = {
    "circle": lambda x, y: torch.hypot(x, y) - 0.88,
    "square": lambda x, y: _box(x, y, 0.78, 0.78),
    "triangle": lambda x, y: _polygon(x, y, [(0.0, -0.92), (0.98, 0.76), (-0.98, 0.76)]),
    "star": lambda x, y: _polygon(x, y, _star_points()),
    "heart": _heart,
    "cross": lambda x, y: torch.minimum(_box(x, y, 0.9, 0.33), _box(x, y, 0.33, 0.9)),
    "ring": lambda x, y: (torch.hypot(x, y) - 0.66).abs() - 0.27,
    "moon": _moon,
    # only parts of figures:
    "disc": lambda x, y: torch.hypot(x, y) - 1.0,
    "plate": lambda x, y: _box(x, y, 1.0, 1.0),
    "dome": lambda x, y: torch.maximum(torch.hypot(x, y - 0.5) - 1.0, y - 0.5),
    "spike": lambda x, y: _polygon(x, y, [(0.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]),
    "cone": lambda x, y: _polygon(x, y, [(-1.0, -1.0), (1.0, -1.0), (0.0, 1.0)]),
    "fin": lambda x, y: _polygon(x, y, [(1.0, 0.0), (-1.0, -1.0), (-1.0, 1.0)]),
}
SHAPES = ["circle", "square", "triangle", "star", "heart", "cross", "ring", "moon"]


@dataclasses.dataclass(frozen=True)
class Part:
    """One primitive of a figure: where it sits in the figure's frame, its half extents and its colour."""

    primitive: str
    x: float
    y: float
    sx: float
    sy: float
    colour: RGB


def shape_parts(shape: str, colour: RGB) -> tuple[Part, ...]:
    return (Part(shape, 0.0, 0.0, 1.0, 1.0, colour),)


# New subjects: known to the model only through their LoRAs.
SUBJECTS: dict[str, tuple[Part, ...]] = {
    "mushroom": (
        Part("plate", 0.0, 0.52, 0.27, 0.42, rgb("#f6e3b4")),
        Part("dome", 0.0, -0.25, 0.92, 0.82, rgb("#c2185b")),
        Part("disc", -0.36, -0.2, 0.18, 0.18, rgb("#ffffff")),
        Part("disc", 0.36, -0.2, 0.18, 0.18, rgb("#ffffff")),
    ),
    "house": (
        Part("plate", 0.0, 0.42, 0.68, 0.5, rgb("#f4c95d")),
        Part("spike", 0.0, -0.5, 0.98, 0.44, rgb("#9c2f1f")),
        Part("plate", 0.0, 0.6, 0.2, 0.32, rgb("#1f7a8c")),
    ),
    "fish": (
        Part("fin", -0.68, 0.0, 0.34, 0.52, rgb("#12908e")),
        Part("disc", 0.2, 0.0, 0.72, 0.5, rgb("#ff7a3d")),
        Part("disc", 0.52, -0.1, 0.13, 0.13, rgb("#14213d")),
    ),
    "icecream": (
        Part("cone", 0.0, 0.42, 0.48, 0.6, rgb("#c98b45")),
        Part("disc", 0.0, -0.36, 0.56, 0.5, rgb("#ff8fb8")),
        Part("disc", 0.0, -0.88, 0.17, 0.17, rgb("#c1121f")),
    ),
    "lamp": (
        Part("plate", 0.0, 0.36, 0.13, 0.5, rgb("#5b4b8a")),
        Part("plate", 0.0, 0.86, 0.6, 0.13, rgb("#5b4b8a")),
        Part("dome", 0.0, -0.5, 0.78, 0.66, rgb("#35c2b0")),
    ),
    "robot": (
        Part("plate", 0.0, 0.58, 0.72, 0.38, rgb("#4f6d8f")),
        Part("plate", 0.0, -0.34, 0.5, 0.44, rgb("#8ecae6")),
        Part("disc", -0.2, -0.36, 0.14, 0.16, rgb("#d62828")),
        Part("disc", 0.2, -0.36, 0.14, 0.16, rgb("#d62828")),
    ),
}


@dataclasses.dataclass(frozen=True)
class Style:
    """How a scene is drawn. Lengths in pixels, colours in 0..1."""

    ground: str = "plain"  # plain, fade, checker, grid, bands, dots, horizon, slant
    ground1: RGB = (1.0, 1.0, 1.0)
    ground2: RGB = (1.0, 1.0, 1.0)
    period: float = 16.0
    fill: str = "solid"  # none, solid, stripes, shade
    palette: float = 0.0  # 0: an object's own colour; 1: a ramp from `dark` to `light` by its brightness
    dark: RGB = (0.0, 0.0, 0.0)
    light: RGB = (1.0, 1.0, 1.0)
    line: float = 0.0
    line_own: bool = False
    line_colour: RGB = (0.0, 0.0, 0.0)
    glow: float = 0.0
    shadow: float = 0.0


GROUNDS = ["plain", "fade", "checker", "grid", "bands", "dots", "horizon", "slant"]
FILLS = ["none", "solid", "stripes", "shade"]

BASE_STYLES: dict[str, Style] = {
    "flat": Style(ground1=rgb("#ececec")),
    "outline": Style(ground1=rgb("#fffdf8"), fill="none", line=6.0, line_own=True),
    "neon": Style(ground1=rgb("#0b0b16"), fill="none", line=6.0, line_own=True, glow=0.9),
    "striped": Style(ground1=rgb("#dfe8f6"), fill="stripes", period=16.0),
    "blueprint": Style(
        ground="grid",
        ground1=rgb("#1c479c"),
        ground2=rgb("#4a74c4"),
        period=24.0,
        fill="none",
        line=5.0,
        line_colour=rgb("#f4f8ff"),
    ),
    "shadow": Style(ground1=rgb("#dcb483"), shadow=9.0),
    "sunset": Style(
        ground="fade",
        ground1=rgb("#5a3d8f"),
        ground2=rgb("#ffb37a"),
        fill="solid",
        palette=1.0,
        dark=rgb("#150b26"),
        light=rgb("#6b3d85"),
    ),
    "comic": Style(
        ground="checker",
        ground1=rgb("#b9c3cf"),
        ground2=rgb("#e4e9ef"),
        period=32.0,
        line=5.0,
        line_colour=rgb("#15151a"),
    ),
}

# New styles: known to the model only through their LoRAs.
NEW_STYLES: dict[str, Style] = {
    "ember": Style(
        ground1=rgb("#0f4c5c"),
        palette=1.0,
        dark=rgb("#d1495b"),
        light=rgb("#ffb35c"),
        line=5.0,
        line_colour=rgb("#101418"),
    ),
    "candy": Style(
        ground="bands",
        ground1=rgb("#ffc2dd"),
        ground2=rgb("#fff0f7"),
        period=32.0,
        palette=1.0,
        dark=rgb("#c9277f"),
        light=rgb("#ff7eb6"),
        line=5.0,
        line_colour=rgb("#ffffff"),
    ),
    "gilded": Style(
        ground1=rgb("#5c0f1f"),
        fill="none",
        line=6.0,
        line_colour=rgb("#f2c14e"),
    ),
    "mint": Style(
        ground1=rgb("#bfead6"),
        fill="stripes",
        period=16.0,
        palette=1.0,
        dark=rgb("#0d5c46"),
        light=rgb("#2c8f6f"),
        line=5.0,
        line_colour=rgb("#0a3d30"),
    ),
    "dusk": Style(
        ground="horizon",
        ground1=rgb("#2b2d6e"),
        ground2=rgb("#141538"),
        palette=1.0,
        dark=rgb("#8d99ff"),
        light=rgb("#f1f3ff"),
    ),
    "poster": Style(
        ground="slant",
        ground1=rgb("#ffd23f"),
        ground2=rgb("#ff9f1c"),
        period=40.0,
        palette=1.0,
        dark=rgb("#1b1b1e"),
        light=rgb("#4b3b47"),
        line=5.0,
        line_colour=rgb("#fffdf5"),
    ),
    "paper": Style(
        ground="checker",
        ground1=rgb("#f7efd8"),
        ground2=rgb("#e3d3a8"),
        period=32.0,
        palette=1.0,
        dark=rgb("#6b4226"),
        light=rgb("#c79a6b"),
        line=5.0,
        line_colour=rgb("#3b2413"),
    ),
    "circuit": Style(
        ground="dots",
        ground1=rgb("#06281c"),
        ground2=rgb("#12573d"),
        period=24.0,
        fill="none",
        line=5.5,
        line_colour=rgb("#4df2a1"),
        glow=0.6,
    ),
}
STYLES: dict[str, Style] = {**BASE_STYLES, **NEW_STYLES}

# Pairs that the base never sees together, although it knows both halves.
HELD_OUT = {
    ("star", "neon"),
    ("heart", "blueprint"),
    ("cross", "comic"),
    ("moon", "striped"),
    ("ring", "shadow"),
    ("triangle", "outline"),
}


@dataclasses.dataclass(frozen=True)
class Scene:
    """One picture: its parts, the style, the object's centre (-1..1) and its half extent (0..1).

    `shape`, `colour` and `style_name` are the words for it; None where it has no word.
    """

    parts: tuple[Part, ...]
    style: Style
    x: float
    y: float
    scale: float
    shape: str | None = None
    colour: str | None = None
    style_name: str | None = None


def _place(rng: random.Random) -> tuple[float, float, float]:
    scale = rng.uniform(0.6, 0.84)
    room = 0.96 - scale
    return rng.uniform(-room, room), rng.uniform(-room, room), scale


def shape_scene(shape: str, colour: str, style: str, rng: random.Random) -> Scene:
    """A base shape in a named style, at a random place and size."""
    x, y, scale = _place(rng)
    return Scene(shape_parts(shape, COLOURS[colour]), STYLES[style], x, y, scale, shape, colour, style)


def subject_scene(subject: str, style: str, rng: random.Random) -> Scene:
    """A subject in a named style, at a random place and size."""
    x, y, scale = _place(rng)
    return Scene(SUBJECTS[subject], STYLES[style], x, y, scale, subject, None, style)


def _any_colour(rng: random.Random) -> RGB:
    if rng.random() < 0.6:
        return rng.choice(list(COLOURS.values()))
    return (rng.random(), rng.random(), rng.random())


def random_figure(rng: random.Random) -> tuple[Part, ...]:
    """A figure of two to four parts with no name: what the word "figure" means to the base."""
    bodies = ["disc", "plate", "dome", "spike", "cone", "fin"]
    first = Part(
        rng.choice(bodies),
        rng.uniform(-0.2, 0.2),
        rng.uniform(0.2, 0.5),
        rng.uniform(0.2, 0.75),
        rng.uniform(0.3, 0.5),
        _any_colour(rng),
    )
    second = Part(
        rng.choice(bodies),
        rng.choice([0.0, first.x, rng.uniform(-0.3, 0.3)]),
        first.y - first.sy - rng.uniform(0.1, 0.5),
        rng.uniform(0.25, 0.95),
        rng.uniform(0.25, 0.7),
        _any_colour(rng),
    )
    parts = [first, second]
    if rng.random() < 0.25:  # lying down: parts beside each other
        parts = [dataclasses.replace(p, x=p.y, y=p.x, sx=p.sy, sy=p.sx) for p in parts]
    host = rng.choice(parts)
    extra = rng.choice([0, 1, 1, 2])
    size = rng.uniform(0.12, 0.24)
    colour = _any_colour(rng)
    kind = rng.choice(["disc", "plate"])
    aside = rng.uniform(0.15, 0.4) if extra == 2 else rng.choice([0.0, rng.uniform(-0.4, 0.4)])
    for sign in (-1, 1)[:extra]:
        parts.append(Part(kind, host.x + sign * aside, host.y, size, size * rng.choice([1.0, 1.4]), colour))
    top = min(p.y - p.sy for p in parts)
    bottom = max(p.y + p.sy for p in parts)
    left = min(p.x - p.sx for p in parts)
    right = max(p.x + p.sx for p in parts)
    shrink = 2.0 / max(bottom - top, right - left)
    cx, cy = (left + right) / 2, (top + bottom) / 2
    return tuple(
        Part(p.primitive, (p.x - cx) * shrink, (p.y - cy) * shrink, p.sx * shrink, p.sy * shrink, p.colour)
        for p in parts
    )


def _brightness(colour: RGB) -> float:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def _contrasting(against: RGB, rng: random.Random) -> RGB:
    for _ in range(50):
        colour = (rng.random(), rng.random(), rng.random())
        if abs(_brightness(colour) - _brightness(against)) > 0.3:
            return colour
    return (0.0, 0.0, 0.0) if _brightness(against) > 0.5 else (1.0, 1.0, 1.0)


def random_style(rng: random.Random) -> Style:
    """A style with no name, of grounds, palettes and lines: what the base draws for a style it cannot know."""
    ground = rng.choice(["plain", "plain", "plain", *GROUNDS[1:]])
    ground1 = (rng.random(), rng.random(), rng.random())
    mix = rng.uniform(0.15, 0.4)
    target = rng.choice([(0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (rng.random(), rng.random(), rng.random())])
    ground2 = tuple(a * (1 - mix) + b * mix for a, b in zip(ground1, target, strict=True))
    fill = rng.choice(["none", "solid", "solid", "solid", "stripes", "shade"])
    lined = fill == "none" or rng.random() < 0.5
    dark = _contrasting(ground1, rng)
    light = _contrasting(ground1, rng)
    if _brightness(dark) > _brightness(light):
        dark, light = light, dark
    line_colour = _contrasting(ground1 if fill == "none" or rng.random() < 0.5 else dark, rng)
    return Style(
        ground=ground,
        ground1=ground1,
        ground2=ground2,  # type: ignore[arg-type]
        period=16.0 if fill == "stripes" else rng.choice([24.0, 32.0, 40.0]),
        fill=fill,
        palette=float(rng.random() < 0.7),
        dark=dark,
        light=light,
        line=rng.uniform(4.5, 7.0) if lined else 0.0,
        line_own=rng.random() < 0.2,
        line_colour=line_colour,
        glow=rng.uniform(0.4, 0.9) if lined and rng.random() < 0.2 else 0.0,
        shadow=rng.uniform(7.0, 10.0) if fill != "none" and rng.random() < 0.2 else 0.0,
    )


# Names that the base does know: one figure, one style each, drawn once and for all. They teach it what a name is,
# in every style and for every figure, so that a LoRA has only to add one more. No new subject or style is among them.
NAMED_FIGURES = {
    word: random_figure(random.Random(f"figure {word}"))
    for word in (
        "abri bolu ceft dwen elgo firn gulm hesk ipta jolb krad lumo "
        "mabb nexo opul pivt quon ruft sabo tirl ungo vemp wosk yibb"
    ).split()
}
NAMED_STYLES = {
    word: random_style(random.Random(f"style {word}"))
    for word in "zald aphi brox cind derm evol flun gask hyle irko jemp kant lorb moxi nurd orba".split()
}

# Shares of the base's pictures: figures (the rest are shapes), figures with a name, styles without one.
FIGURES, FIGURES_NAMED = 0.5, 0.5
STYLES_NAMED, STYLES_RANDOM = 0.25, 0.15


def _base_style(rng: random.Random) -> tuple[str | None, Style]:
    kind = rng.random()
    if kind < STYLES_RANDOM:
        return None, random_style(rng)
    known = NAMED_STYLES if kind < STYLES_RANDOM + STYLES_NAMED else BASE_STYLES
    name = rng.choice(list(known))
    return name, known[name]


def base_scene(rng: random.Random) -> Scene:
    """One scene of the base model's training set."""
    x, y, scale = _place(rng)
    style_name, style = _base_style(rng)
    if rng.random() < FIGURES:
        if rng.random() < FIGURES_NAMED:
            name = rng.choice(list(NAMED_FIGURES))
            return Scene(NAMED_FIGURES[name], style, x, y, scale, f"{name} figure", None, style_name)
        return Scene(random_figure(rng), style, x, y, scale, "figure", None, style_name)
    shape = rng.choice(SHAPES)
    while (shape, style_name) in HELD_OUT:
        shape = rng.choice(SHAPES)
    colour = rng.choice(list(COLOURS))
    return Scene(shape_parts(shape, COLOURS[colour]), style, x, y, scale, shape, colour, style_name)


# --- words -------------------------------------------------------------------------------------------------

# Tokens without a meaning, for new subjects and styles; the base learns to draw anything for them.
IDENTIFIERS = (
    "zub qorl wix dref plim snaz vorp jalk miv tesh kolp bruv yant cedo huft nizz "
    "gorm lutz pexi swaf drin fomp vask jurn quep blit zorn mekk rilf tuvo hasp wend"
).split()
PART_WORDS = ["disc", "plate", "dome", "spike", "cone", "fin"]
CLEARLY = 0.1  # off the middle by a twentieth of the picture, and hardly in the other direction: a place has a word
PLACES = ["left", "right", "top", "bottom"]
WORDS = (
    "a an the of in on with and style picture figure drawing photo image".split()
    + SHAPES
    + list(COLOURS)
    + list(BASE_STYLES)
    + IDENTIFIERS
    + PART_WORDS
    + list(NAMED_FIGURES)
    + list(NAMED_STYLES)
    + PLACES
)


def prompt(shape: str | None, colour: str | None, style: str | None, place: str | None = None) -> str:
    """The grammar of every prompt: 'a red star on the left in neon style', with any part left out."""
    words = ["a", colour, shape or "picture"]
    if place is not None:
        words += ["on", "the", place]
    if style is not None:
        words += ["in", style, "style"]
    return " ".join(w for w in words if w)


def place(scene: Scene) -> str | None:
    """Where the object is, if it is clearly somewhere: 'left', 'right', 'top' or 'bottom' of the middle."""
    across = abs(scene.x) > abs(scene.y)
    offset, other = (scene.x, scene.y) if across else (scene.y, scene.x)
    if abs(offset) < max(CLEARLY, 2 * abs(other)):
        return None
    return PLACES[(0 if across else 2) + (offset > 0)]


def _described(parts: Sequence[Part]) -> str:
    """'red dome on blue plate with disc': a figure in words, colours only where there is a word for them."""
    names = {value: name for name, value in COLOURS.items()}

    def words(part: Part) -> str:
        return " ".join([*([names[part.colour]] if part.colour in names else []), part.primitive])

    first, second = parts[:2]
    joint = "on" if second.y < first.y - 0.2 else "and"
    text = f"{words(second)} {joint} {words(first)}"
    return f"{text} with {words(parts[2])}" if len(parts) > 2 else text


def caption(scene: Scene, rng: random.Random) -> str:
    """A training prompt for the scene: parts left out at random, identifiers where there is no word."""
    shape, colour, style = scene.shape, scene.colour, scene.style_name
    if rng.random() < 0.08:
        shape = None
    if rng.random() < 0.12:
        colour = None
    if rng.random() < 0.1:
        style = None
    if shape == "figure":
        told = rng.random()
        if told < 0.2:
            shape = f"{rng.choice(IDENTIFIERS)} figure"
        elif told < 0.9:
            shape = f"{_described(scene.parts)} figure"
    if style is None and rng.random() < 0.5:
        style = rng.choice(IDENTIFIERS)
    told_place = place(scene) if rng.random() < 0.35 and len((shape or "").split()) < 6 else None
    return prompt(shape, colour, style, told_place)


# --- drawing -----------------------------------------------------------------------------------------------


def _column(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)


def _colour_column(values: Sequence[RGB], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 3, 1, 1)


def _cover(distance: Tensor) -> Tensor:
    """Pixel coverage of the inside of a distance in pixels."""
    return (0.5 - distance).clamp(0, 1)


def _blend(below: Tensor, above: Tensor, alpha: Tensor) -> Tensor:
    """below, above: B3HW; alpha: BHW."""
    return below + (above - below) * alpha.unsqueeze(1)


def _wave(t: Tensor, period: Tensor) -> Tensor:
    """Antialiased square wave of the given period in pixels, 0 or 1."""
    phase = torch.remainder(t / period, 1.0)
    return (0.5 + ((phase - 0.5).abs() - 0.25) * period).clamp(0, 1)


def _ground(styles: Sequence[Style], px: Tensor, py: Tensor, device: torch.device) -> Tensor:
    kind = _column([GROUNDS.index(s.ground) for s in styles], device)
    period = _column([s.period for s in styles], device)
    one = _colour_column([s.ground1 for s in styles], device)
    two = _colour_column([s.ground2 for s in styles], device)
    amount = torch.zeros(len(styles), SIZE, SIZE, device=device)
    across, down = _wave(px, period), _wave(py, period)
    line = 1.4
    grid_x = _cover((torch.remainder(px, period) - period / 2).abs() - line)
    grid_y = _cover((torch.remainder(py, period) - period / 2).abs() - line)
    dot_x = torch.remainder(px, period) - period / 2
    dot_y = torch.remainder(py, period) - period / 2
    patterns = {
        "fade": (py / (SIZE - 1)).expand_as(amount),
        "checker": across + down - 2 * across * down,
        "grid": torch.maximum(grid_x, grid_y),
        "bands": down.expand_as(amount),
        "dots": _cover(torch.hypot(dot_x, dot_y) - period * 0.25),
        "horizon": _cover(SIZE * 0.62 - py).expand_as(amount),
        "slant": _wave((px + py) * math.sqrt(0.5), period),
    }
    for name, pattern in patterns.items():
        amount = torch.where(kind == GROUNDS.index(name), pattern, amount)
    return _blend(one.expand(-1, -1, SIZE, SIZE), two.expand(-1, -1, SIZE, SIZE), amount)


def _part_distance(scenes: Sequence[Scene], slot: int, px: Tensor, py: Tensor) -> Tensor:
    """Distance in pixels of every scene's part number `slot`: BHW; far away where it has no such part."""
    device = px.device
    out = torch.full((len(scenes), SIZE, SIZE), 1e3, device=device)
    groups: dict[str, list[int]] = {}
    for i, scene in enumerate(scenes):
        if slot < len(scene.parts):
            groups.setdefault(scene.parts[slot].primitive, []).append(i)
    for name, members in groups.items():
        parts = [scenes[i].parts[slot] for i in members]
        owners = [scenes[i] for i in members]
        sx = _column([o.scale * p.sx for o, p in zip(owners, parts, strict=True)], device) * HALF
        sy = _column([o.scale * p.sy for o, p in zip(owners, parts, strict=True)], device) * HALF
        cx = _column([o.x + o.scale * p.x for o, p in zip(owners, parts, strict=True)], device) * HALF + HALF
        cy = _column([o.y + o.scale * p.y for o, p in zip(owners, parts, strict=True)], device) * HALF + HALF
        x, y = (px + 0.5 - cx) / sx, (py + 0.5 - cy) / sy
        distance = PRIMITIVES[name](x, y)
        if name == "plate":  # exact for any aspect
            qx, qy = (x.abs() - 1) * sx, (y.abs() - 1) * sy
            distance = torch.hypot(qx.clamp(min=0), qy.clamp(min=0)) + torch.maximum(qx, qy).clamp(max=0)
        elif name == "disc":  # first-order distance to an ellipse
            radius = torch.hypot(x, y)
            slope = torch.hypot(x / sx, y / sy).clamp(min=1e-4)
            distance = radius * (radius - 1) / slope
            distance = torch.where(radius < 0.3, -torch.minimum(sx, sy) * (1 - radius), distance)
        else:
            distance = distance * torch.minimum(sx, sy)
        out[members] = distance
    return out


@torch.no_grad()
def render(scenes: Sequence[Scene], device: torch.device | str = "cpu") -> Tensor:
    """Draws the scenes. Returns B3HW float32 in 0..1, 128 x 128."""
    device = torch.device(device)
    grid = torch.arange(SIZE, dtype=torch.float32, device=device)
    px, py = grid.view(1, 1, -1), grid.view(1, -1, 1)
    styles = [s.style for s in scenes]
    picture = _ground(styles, px, py, device)

    palette = _column([s.palette for s in styles], device).unsqueeze(1)
    dark = _colour_column([s.dark for s in styles], device)
    light = _colour_column([s.light for s in styles], device)
    width = _column([s.line for s in styles], device)
    line_own = _column([float(s.line_own) for s in styles], device).unsqueeze(1)
    line_colour = _colour_column([s.line_colour for s in styles], device)
    fill = _column([FILLS.index(s.fill) for s in styles], device)
    period = _column([s.period for s in styles], device)
    glow = _column([s.glow for s in styles], device)
    shadow = _column([s.shadow for s in styles], device)
    weights = torch.tensor([0.299, 0.587, 0.114], device=device).view(1, 3, 1, 1)

    slots = max(len(s.parts) for s in scenes)
    distances = [_part_distance(scenes, slot, px, py) for slot in range(slots)]
    if bool((shadow > 0).any()):
        moved = [dataclasses.replace(s, x=s.x + s.style.shadow / HALF, y=s.y + s.style.shadow / HALF) for s in scenes]
        for slot in range(slots):
            alpha = _cover(_part_distance(moved, slot, px, py)) * (shadow > 0)
            picture = _blend(picture, picture * 0.0 + _shadow_colour(styles, device), alpha)

    stripes = _wave(py, period)
    for slot, distance in enumerate(distances):
        own = _colour_column([s.parts[slot].colour if slot < len(s.parts) else (0, 0, 0) for s in scenes], device)
        brightness = (own * weights).sum(1, keepdim=True)
        colour = own + palette * (dark + (light - dark) * brightness - own)
        stroke = line_colour + line_own * (colour - line_colour)
        halo = torch.exp(-(distance + width / 2).abs() / 6.0) * glow * 0.75
        picture = _blend(picture, stroke.expand_as(picture), halo.clamp(0, 1) * (distance < 500))
        inside = _cover(distance)
        shade = 1.25 - 0.6 * (py / SIZE)
        body = torch.where(
            (fill == FILLS.index("shade")).unsqueeze(1), (colour * shade.unsqueeze(1)).clamp(0, 1), colour
        )
        pale = colour + 0.72 * (1 - colour)
        body = torch.where((fill == FILLS.index("stripes")).unsqueeze(1), _mix(body, pale, stripes), body)
        # parts of figures hide what is behind them; unfilled ones show the ground through
        alpha = inside * (fill != FILLS.index("none"))
        picture = _blend(picture, body.expand_as(picture), alpha)
        # the line lies inside the edge, so neighbouring parts keep their own
        border = _cover((distance + width / 2).abs() - width / 2) * (width > 0)
        picture = _blend(picture, stroke.expand_as(picture), border)
    return picture.clamp(0, 1)


def _mix(one: Tensor, two: Tensor, amount: Tensor) -> Tensor:
    return one + (two - one) * amount.unsqueeze(1)


def _shadow_colour(styles: Sequence[Style], device: torch.device) -> Tensor:
    return _colour_column([s.ground1 for s in styles], device) * 0.55


def sheet(pictures: Tensor, columns: int, gap: int = 4) -> Tensor:
    """A contact sheet: B3HW in 0..1 -> 3HW on a dark ground."""
    count, _, height, width = pictures.shape
    rows = -(-count // columns)
    out = torch.full((3, rows * (height + gap) + gap, columns * (width + gap) + gap), 0.16)
    for i, picture in enumerate(pictures.cpu()):
        top, left = (i // columns) * (height + gap) + gap, (i % columns) * (width + gap) + gap
        out[:, top : top + height, left : left + width] = picture
    return out


def save_png(picture: Tensor, path: str) -> None:
    """Writes a 3HW picture in 0..1."""
    from PIL import Image

    Image.fromarray((picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()).save(path)
