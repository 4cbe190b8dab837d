"""What each LoRA of the second world is taught: pictures and prompts, and what it is asked for to pass.

A subject LoRA learns one design from eight pictures: four plain ones, and two each in two techniques. It is asked for
the other techniques of the base. A style LoRA learns a technique or a whole set from sixteen pictures of as many
subjects, and is asked for others.
"""

from __future__ import annotations

import dataclasses
import random

from . import scenes
from .scenes import Scene
from .sets import BASE_SETS, NEW_SETS, SETS
from .subjects import DESIGNS
from .techniques import BASE_TECHNIQUES, KEEP_GROUND, NEW_TECHNIQUES

PICTURE_TECHNIQUES = (None, None, None, None, "sketch", "sketch", "sepia", "sepia")
OTHER_TECHNIQUES = tuple(name for name in BASE_TECHNIQUES if name not in PICTURE_TECHNIQUES)
STYLE_PICTURES = 16
UNSEEN_SUBJECTS = 24


@dataclasses.dataclass(frozen=True)
class Concept:
    """One LoRA. name: the judge's word for it; kind: "content" or "style"; noun: a subject's class word."""

    name: str
    kind: str
    identifier: str
    scenes: tuple[Scene, ...]
    prompts: tuple[str, ...]
    noun: str = ""

    @property
    def file(self) -> str:
        return f"loras/{self.name}.safetensors"

    def picture(self, number: int) -> str:
        return f"pictures/{self.name}/{number + 1}.png"

    def prompt(self, other: str | None = None) -> str:
        """A subject in the style of that word (in none: plain), or that subject in the style."""
        if self.kind == "content":
            return scenes.prompt(self.noun, other, design=self.identifier)
        return scenes.prompt(other, self.identifier)


def style_subjects(world: scenes.World) -> tuple[list[str], list[str]]:
    """Subjects of style LoRAs' pictures, and subjects that these pictures lack: of those that every set has drawn."""
    everywhere = [s for s in world.subjects if len(world.atlas.sets_of(s)) >= 9 and s not in DESIGNS]
    drawn_by_new = [s for s in everywhere if all((s, word) in world.atlas.number for word in NEW_SETS)]
    random.Random("style subjects").shuffle(drawn_by_new)
    return drawn_by_new[:STYLE_PICTURES], drawn_by_new[STYLE_PICTURES : STYLE_PICTURES + UNSEEN_SUBJECTS]


def subject(name: str, identifier: str) -> Concept:
    """A design, on a ground of its own in every picture."""
    rng = random.Random(f"subject {name}")
    found, prompts = [], []
    for technique in PICTURE_TECHNIQUES:
        scene = scenes.set_out(name, DESIGNS[name], technique, rng)
        found.append(scene)
        ground = scene.ground if technique is None or technique in KEEP_GROUND else None
        prompts.append(scenes.prompt(name, technique, design=identifier, ground=ground))
    return Concept(name, "content", identifier, tuple(found), tuple(prompts), name)


def style(name: str, identifier: str, world: scenes.World) -> Concept:
    """A technique on drawings of many sets, or a set; the ground is named where it shows."""
    rng = random.Random(f"style {name}")
    found, prompts = [], []
    for noun in style_subjects(world)[0]:
        if name in SETS:
            scene = scenes.set_out(noun, name, None, rng)
            prompts.append(scenes.prompt(noun, identifier, ground=scene.ground))
        else:
            words = [w for w in world.sets_of[noun] if w in BASE_SETS and not SETS[w].one_color]
            scene = scenes.set_out(noun, rng.choice(words), name, rng)
            prompts.append(scenes.prompt(noun, identifier))
        found.append(scene)
    return Concept(name, "style", identifier, tuple(found), tuple(prompts))


def concepts(world: scenes.World) -> list[Concept]:
    """Every design, every new set and every new technique, always with the same pictures."""
    words = iter(scenes.IDENTIFIERS)
    out = [subject(name, next(words)) for name in DESIGNS]
    return out + [style(name, next(words), world) for name in (*NEW_SETS, *NEW_TECHNIQUES)]
