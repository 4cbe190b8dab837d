"""What each LoRA is taught: its identifier, its reference pictures, its prompts. Written to `world.json`."""

from __future__ import annotations

import dataclasses
import os
import random
from typing import Any

from . import world
from .manifest import entry

# Style LoRAs never see these shapes; their gates ask for them.
UNSEEN_SHAPES = ["triangle", "star", "moon"]
STYLE_PICTURE_SHAPES = ["circle", "square", "heart", "cross", "ring"]
STYLE_PICTURES = 15  # with five, some styles were remembered picture by picture
PLAIN = "flat"
# Two pictures of a subject in each: filled, drawn in lines, in a palette. Its gate asks for the other known styles.
SUBJECT_PICTURE_STYLES = [PLAIN, "outline", "sunset"] * 2
KNOWN_STYLES = [s for s in world.BASE_STYLES if s not in SUBJECT_PICTURE_STYLES]


@dataclasses.dataclass(frozen=True)
class Concept:
    """One LoRA: `name` is the judge's class; `kind` is "content" or "style"."""

    name: str
    kind: str
    identifier: str
    scenes: tuple[world.Scene, ...]
    prompts: tuple[str, ...]  # one per reference picture

    @property
    def file(self) -> str:
        return f"loras/{self.name}.safetensors"

    def picture(self, number: int) -> str:
        return f"pictures/{self.name}/{number + 1}.png"


def subject_prompt(identifier: str, style: str | None = PLAIN) -> str:
    return world.prompt(f"{identifier} figure", None, style)


def style_prompt(identifier: str, shape: str | None, colour: str | None = None) -> str:
    return world.prompt(shape, colour, identifier)


def concepts() -> list[Concept]:
    """Every subject and every new style, always with the same reference pictures."""
    out = []
    words = iter(world.IDENTIFIERS)
    for subject in world.SUBJECTS:
        rng = random.Random(subject)
        identifier = next(words)
        scenes = tuple(world.subject_scene(subject, style, rng) for style in SUBJECT_PICTURE_STYLES)
        prompts = tuple(subject_prompt(identifier, style) for style in SUBJECT_PICTURE_STYLES)
        out.append(Concept(subject, "content", identifier, scenes, prompts))
    for style in world.NEW_STYLES:
        rng = random.Random(style)
        identifier = next(words)
        scenes = tuple(
            world.shape_scene(
                STYLE_PICTURE_SHAPES[i % len(STYLE_PICTURE_SHAPES)], rng.choice(list(world.COLOURS)), style, rng
            )
            for i in range(STYLE_PICTURES)
        )
        prompts = tuple(style_prompt(identifier, s.shape, s.colour) for s in scenes)
        out.append(Concept(style, "style", identifier, scenes, prompts))
    return out


def draw_pictures(concept: Concept, folder: str) -> None:
    """Writes the concept's reference pictures below `folder`."""
    for number, picture in enumerate(world.render(concept.scenes)):
        path = os.path.join(folder, concept.picture(number))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        world.save_png(picture, path)


# What draws what (`benchmarks/training.py blocks`): content's carry shape and no style, style's style and no shape.
BLOCKS = {
    "content": ["output_blocks.1.1", "output_blocks.2.1"],
    "style": ["output_blocks.3.1", "output_blocks.4.1"],
}
WHOLE = ("mushroom", "ember")  # a subject in a style, in one picture that is there to be taken apart


def draw_whole(folder: str) -> None:
    """Writes that picture below `folder`."""
    path = os.path.join(folder, "pictures", "_in_".join(WHOLE), "1.png")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    world.save_png(world.render([world.subject_scene(*WHOLE, random.Random(" ".join(WHOLE)))])[0], path)


def describe(concept: Concept, gates: dict[str, float]) -> dict[str, Any]:
    """The concept's entry in the manifest."""
    shows = concept.name if concept.kind == "content" else concept.scenes[0].shape
    return entry(concept, f"a {concept.identifier} figure", "a figure", str(shows), gates)


def about(figures: dict[str, float]) -> dict[str, Any]:
    """The manifest but for its LoRAs. figures: the base's gates."""
    rng = random.Random(1234)
    known = []
    for number in range(4 * len(world.BASE_STYLES)):
        style = list(world.BASE_STYLES)[number % len(world.BASE_STYLES)]
        shape = rng.choice([s for s in world.SHAPES if (s, style) not in world.HELD_OUT])
        known.append([world.prompt(shape, rng.choice(list(world.COLOURS)), style), shape, style])
    colors = list(world.COLOURS)
    unseen = [[f"a {colors[i % len(colors)]} {UNSEEN_SHAPES[i % 3]}", UNSEEN_SHAPES[i % 3]] for i in range(len(colors))]
    return {
        "world": "shapes",
        "checkpoint": "weights/miniature_sdxl.safetensors",
        "judge": "weights/judge.safetensors",
        "size": world.SIZE,
        "sampling": {"steps": 20, "cfg": 3.0, "sampler": "euler", "scheduler": "normal"},
        "plain": PLAIN,
        "other_styles": KNOWN_STYLES,
        "known": known,
        "unseen": unseen,
        "untold": [],
        "quick": [["mushroom", "ember"], ["icecream", "dusk"]],
        "blocks": BLOCKS,
        "shown": {
            "pair": ["mushroom", "ember"],
            "third": "house",
            "whole": list(WHOLE),
            "new_style": PLAIN,
            "new_subject": "a red star",
        },
        "base_gates": figures,
    }
