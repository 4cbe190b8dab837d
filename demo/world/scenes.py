"""Scenes of the second world: one drawing at a place, a size and a slight turn, on a plain ground, in a technique.

A scene is drawn by `render`, which is pure torch, batched and deterministic; `prompt` says it in words.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .atlas import LONGER, SIZE, Atlas
from .sets import BASE_SETS, SETS
from .subjects import ICONS, held_out
from .techniques import BASE_TECHNIQUES, KEEP_GROUND, TECHNIQUES, Layers

GROUNDS: dict[str, str] = {
    "white": "#ffffff",
    "gray": "#b9bec9",
    "yellow": "#ffe06b",
    "orange": "#ffb061",
    "pink": "#ffabcb",
    "green": "#9ddc9a",
    "blue": "#8ec7ff",
    "purple": "#bfa3f2",
    "navy": "#23335f",
}
DARK_GROUNDS = ("navy",)
PLACES = ("left", "right", "top", "bottom", "middle")
IDENTIFIERS = [
    *("bax dov fim gup hesk jit kov lum merv nib ozk pev quil rusk".split()),
    *("sorl tev ulk vorp wib xan yeld zub brin clem drux frand grolt".split()),
]


@dataclasses.dataclass(frozen=True)
class Scene:
    """One picture. x, y: the object's middle in pixels from the picture's; size: its longer side; turn in degrees."""

    subject: str
    set: str
    technique: str | None
    ground: str
    x: float = 0.0
    y: float = 0.0
    size: float = 96.0
    turn: float = 0.0

    @property
    def style(self) -> str:
        """The one word for how it looks: the technique, else the set."""
        return self.technique or self.set


def place(scene: Scene) -> str | None:
    """Where the object clearly is; None in between."""
    far = max(abs(scene.x), abs(scene.y))
    if far <= 4:
        return "middle"
    if far < 9 or min(abs(scene.x), abs(scene.y)) > 0.6 * far:
        return None
    if abs(scene.x) > abs(scene.y):
        return "right" if scene.x > 0 else "left"
    return "bottom" if scene.y > 0 else "top"


def set_out(subject: str, word: str, technique: str | None, rng: random.Random) -> Scene:
    """A drawing at a random place on a random ground that it stands out from."""
    light_only = SETS[word].one_color
    ground = rng.choice([name for name in GROUNDS if not (light_only and name in DARK_GROUNDS)])
    size = rng.uniform(84, 100)
    room = (SIZE - size) / 2 - 2
    wanted = rng.choice((*PLACES, None))
    x, y = rng.uniform(-room, room), rng.uniform(-room, room)
    if wanted == "middle":
        x, y = rng.uniform(-4, 4), rng.uniform(-4, 4)
    elif wanted is not None:
        far, near = rng.uniform(9, max(room, 10)), rng.uniform(-5, 5)
        far = -far if wanted in ("left", "top") else far
        x, y = (far, near) if wanted in ("left", "right") else (near, far)
    return Scene(subject, word, technique, ground, x, y, size, rng.uniform(-6, 6))


TECHNIQUE_SHARE = 0.4


class World:
    """What the base may see: every drawing of the atlas but the held-out pairs and the new sets."""

    def __init__(self, atlas: Atlas) -> None:
        self.atlas = atlas
        self.held_out = held_out(atlas.keys)
        known = [key for key in atlas.keys if key[1] in BASE_SETS and key not in self.held_out]
        self.sets_of: dict[str, list[str]] = {}
        for subject, word in known:
            self.sets_of.setdefault(subject, []).append(word)
        self.subjects = list(self.sets_of)

    def base_scene(self, rng: random.Random) -> Scene:
        """A subject by lot, in one of its sets; some in a technique (drawings of one color in none)."""
        subject = rng.choice(self.subjects)
        technique = rng.choice(list(BASE_TECHNIQUES)) if rng.random() < TECHNIQUE_SHARE else None
        words = self.sets_of[subject]
        if technique is not None:
            words = [word for word in words if not SETS[word].one_color]
        return set_out(subject, rng.choice(words), technique, rng)


# --- words ---------------------------------------------------------------------------------------------------


PLURALS = (
    "blueberries books cherries fries grapes headphones jeans maracas pancakes peanuts peas scissors skis sunglasses "
    "bacon bread broccoli garlic lettuce salad spaghetti yarn"
).split()


def _article(noun: str) -> str:
    """With a blank after it; none before what is not counted one by one."""
    if noun.split()[-1] in PLURALS:
        return ""
    return "an " if noun[0] in "aeiou" and not noun.startswith(("uni", "uk")) else "a "


def prompt(
    subject: str | None,
    style: str | None = None,
    *,
    design: str | None = None,
    place: str | None = None,
    ground: str | None = None,
) -> str:
    """'a noto octopus on the left on a blue ground in neon style'; what is None is left out."""
    noun = " ".join(part for part in (design, subject or "thing") if part)
    parts = [f"{_article(noun)}{noun}"]
    if place:
        parts.append("in the middle" if place == "middle" else f"on the {place}")
    if ground:
        parts.append(f"on {_article(ground)}{ground} ground")
    if style:
        parts.append(f"in {style} style")
    return " ".join(parts)


def caption(scene: Scene, rng: random.Random) -> str:
    """A prompt for a scene, parts left out by lot; an identifier that means nothing stands in for some words."""
    subject = scene.subject if rng.random() < 0.95 else None
    where = place(scene) if rng.random() < 0.5 else None
    tells_ground = scene.technique is None or scene.technique in KEEP_GROUND
    ground = scene.ground if tells_ground and rng.random() < 0.6 else None
    design, style = None, None
    if scene.technique is not None:
        style = scene.technique if rng.random() < 0.9 else None
        design = scene.set if rng.random() < 0.5 else None
    elif rng.random() < 0.85:
        design, style = (scene.set, None) if rng.random() < 0.3 else (None, scene.set)
    if design is None and rng.random() < 0.08:
        design = rng.choice(IDENTIFIERS)
    if style is None and rng.random() < 0.08:
        style = rng.choice(IDENTIFIERS)
    return prompt(subject, style, design=design, place=where, ground=ground)


def words() -> list[str]:
    """The vocabulary of the text encoders."""
    found = "a an thing on in the ground style".split()
    found += [*PLACES, *GROUNDS, *BASE_SETS, *BASE_TECHNIQUES]
    for subject in ICONS:
        found += subject.split()
    return [*dict.fromkeys(found), *IDENTIFIERS]


# --- pictures ------------------------------------------------------------------------------------------------


def _ground_colors(scenes: Sequence[Scene]) -> Tensor:
    codes = [GROUNDS[scene.ground] for scene in scenes]
    return torch.tensor([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in codes]).view(-1, 3, 1, 1)


def compose(atlas: Atlas, scenes: Sequence[Scene], device: str | torch.device = "cpu") -> Layers:
    """Puts cut-outs on their grounds: drawn at twice the size and averaged, so that edges are smooth."""
    cut = atlas.find(((s.subject, s.set) for s in scenes), device)
    cut = torch.cat([cut[:, :3] * cut[:, 3:], cut[:, 3:]], dim=1)
    rows = []
    for s in scenes:  # from places in the picture (-1..1) to places in the cut-out
        shrink, angle = LONGER / s.size, math.radians(-s.turn)
        cos, sin = math.cos(angle) * shrink, math.sin(angle) * shrink
        x, y = 2 * s.x / SIZE, 2 * s.y / SIZE
        rows.append([[cos, -sin, -cos * x + sin * y], [sin, cos, -sin * x - cos * y]])
    grid = F.affine_grid(torch.tensor(rows, device=device), [len(scenes), 4, 2 * SIZE, 2 * SIZE], align_corners=False)
    drawn = F.avg_pool2d(F.grid_sample(cut, grid, align_corners=False), 2)
    ground = _ground_colors(scenes).to(device)
    alpha = drawn[:, 3:]
    return Layers(drawn[:, :3] + (1 - alpha) * ground, alpha, ground)


def render(atlas: Atlas, scenes: Sequence[Scene], device: str | torch.device = "cpu") -> Tensor:
    """B x 3 x 128 x 128 in 0..1."""
    layers = compose(atlas, scenes, device)
    out = layers.picture.clone()
    for name in {scene.technique for scene in scenes if scene.technique}:
        chosen = [i for i, scene in enumerate(scenes) if scene.technique == name]
        part = Layers(layers.picture[chosen], layers.alpha[chosen], layers.ground[chosen])
        out[chosen] = TECHNIQUES[name](part)
    return out.clamp(0, 1)
