"""What each LoRA is taught: pictures and prompts, and what it is asked for to pass.

A subject LoRA learns one design from eight pictures: four plain ones, and two each in two techniques. It is asked for
the other techniques of the base. A style LoRA learns a technique or a whole set from ninety-six pictures of as many
subjects, of which sixteen ship, and is asked for others.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from . import scenes
from .atlas import SIZE
from .scenes import Scene
from .sets import BASE_SETS, NEW_SETS, SETS
from .subjects import DESIGNS
from .techniques import BASE_TECHNIQUES, KEEP_GROUND

PICTURE_TECHNIQUES = (None, None, None, None, "sketch", "sketch", "sepia", "sepia")
OTHER_TECHNIQUES = tuple(name for name in BASE_TECHNIQUES if name not in PICTURE_TECHNIQUES)
STYLE_PICTURES = 96
SHOWN = 16  # of a style's pictures, at most: those that ship
UNSEEN_SUBJECTS = 24
# Starts of layer names by what the layers draw, as `benchmarks/training.py blocks` finds.
BLOCKS = {"content": ["output_blocks.2.1"], "style": ["output_blocks.3.1"]}


@dataclasses.dataclass(frozen=True)
class Choice:
    """What LoRAs are made of. designs: subject -> the set that one drawing of it is from; styles: sets, techniques."""

    designs: Mapping[str, str]
    styles: Sequence[str]


# In the order of how much one sees of them: the demo and thumbnails show the first ones that pass.
_SUBJECTS = "octopus house rocket penguin mushroom teapot castle turtle guitar elephant".split()
# Hatching and cross-stitch are left out: their lines are finer than the autoencoder draws.
_STYLES = "chalk gilded riso streamline contrast cutpaper watercolor halftone".split()
_STYLES += "plaster gingerbread glass moonlight popart".split()
SHIPPED = Choice({name: DESIGNS[name] for name in _SUBJECTS}, _STYLES)

# Pairs that two loaders spoil (benchmarks/results/drawn.jsonl): those to look at first.
QUICK = (("house", "moonlight"), ("rocket", "chalk"))
SHOWN_PAIR = QUICK[1]  # on thumbnails, where it is the plainer one


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
    """Subjects of the pictures that ship with style LoRAs, and subjects that no style's pictures show.

    Every set has drawn them.
    """
    held_out = {subject for subject, _ in world.held_out}
    everywhere = [s for s in world.subjects if len(world.atlas.sets_of(s)) >= 9 and s not in held_out]
    drawn_by_new = [s for s in everywhere if all((s, word) in world.atlas.number for word in NEW_SETS)]
    random.Random("style subjects").shuffle(drawn_by_new)
    return drawn_by_new[:SHOWN], drawn_by_new[SHOWN : SHOWN + UNSEEN_SUBJECTS]


def taught_subjects(world: scenes.World, name: str) -> list[str]:
    """Subjects of all pictures that a style LoRA learns from, those that ship first: of a set, what it has drawn."""
    first, unseen = style_subjects(world)
    held_out = {subject for subject, _ in world.held_out}
    more = [s for s in world.subjects if s not in held_out and s not in unseen and s not in first]
    if name in SETS:
        more = [s for s in more if (s, name) in world.atlas.number]
    else:
        more = [s for s in more if _colored(world, s)]
    random.Random("taught subjects").shuffle(more)
    return [*first, *more][:STYLE_PICTURES]


def _colored(world: scenes.World, subject: str) -> list[str]:
    """Sets of the base that have drawn it in more than one color."""
    return [word for word in world.sets_of[subject] if word in BASE_SETS and not SETS[word].one_color]


def subject(name: str, word: str, identifier: str) -> Concept:
    """The drawing of a set, on a ground of its own in every picture."""
    rng = random.Random(f"subject {name}")
    found, prompts = [], []
    for technique in PICTURE_TECHNIQUES:
        scene = scenes.set_out(name, word, technique, rng)
        found.append(scene)
        ground = scene.ground if technique is None or technique in KEEP_GROUND else None
        prompts.append(scenes.prompt(name, technique, design=identifier, ground=ground))
    return Concept(name, "content", identifier, tuple(found), tuple(prompts), name)


def style(name: str, identifier: str, world: scenes.World) -> Concept:
    """A technique on drawings of many sets, or a set; the ground is named where it shows."""
    rng = random.Random(f"style {name}")
    found, prompts = [], []
    for noun in taught_subjects(world, name):
        if name in SETS:
            scene = scenes.set_out(noun, name, None, rng)
            prompts.append(scenes.prompt(noun, identifier, ground=scene.ground))
        else:
            scene = scenes.set_out(noun, rng.choice(_colored(world, noun)), name, rng)
            prompts.append(scenes.prompt(noun, identifier))
        found.append(scene)
    return Concept(name, "style", identifier, tuple(found), tuple(prompts))


def concepts(world: scenes.World, choice: Choice = SHIPPED) -> list[Concept]:
    """Of every design and every style, always with the same pictures."""
    words = iter(scenes.IDENTIFIERS)
    out = [subject(name, word, next(words)) for name, word in choice.designs.items()]
    return out + [style(name, next(words), world) for name in choice.styles]


# --- the manifest --------------------------------------------------------------------------------------------

CHECKPOINT = "weights/miniature_sdxl.safetensors"
KNOWN = 32  # prompts of the base's own words


def describe(concept: Concept, gates: dict[str, float]) -> dict[str, Any]:
    """A LoRA's entry in the manifest, as `demo.manifest.Trained` is read from it."""
    a_subject = concept.kind == "content"
    return {
        "kind": concept.kind,
        "file": concept.file,
        "identifier": concept.identifier,
        "words": concept.prompt() if a_subject else f"in {concept.identifier} style",
        "of_class": scenes.prompt(concept.noun or None),
        "shows": concept.scenes[0].subject,
        "pictures": [concept.picture(i) for i in range(len(concept.prompts))][:SHOWN],
        "picture_prompts": list(concept.prompts)[:SHOWN],
        "drawings": sorted({f"{scene.subject} of {scene.set}" for scene in concept.scenes}),
        "gates": gates,
    }


def whole(names: Sequence[str], choice: Choice = SHIPPED) -> list[str]:
    """A subject and a technique that stand in one picture; empty where no LoRA of either is there."""
    every = itertools.product(choice.designs, (style for style in choice.styles if style not in SETS))
    return next(_there([SHOWN_PAIR, *every], names), [])


def _there(pairs: Iterable[tuple[str, str]], names: Sequence[str]) -> Iterator[list[str]]:
    """The pairs of which both LoRAs are there."""
    return ([subject, style] for subject, style in pairs if subject in names and style in names)


def drawings(world: scenes.World, choice: Choice = SHIPPED) -> list[tuple[str, str]]:
    """What benchmarks compose true pictures of: each design, subjects of styles' gates, and both in the new sets."""
    pictures, unseen = style_subjects(world)
    found = list(choice.designs.items())
    for subject in (pictures[0], *unseen):
        found.append((subject, next(w for w in world.sets_of[subject] if not SETS[w].one_color)))
    found += [
        (subject, word) for subject in (*choice.designs, pictures[0], *unseen) for word in choice.styles if word in SETS
    ]
    return [key for key in found if key in world.atlas.number]


def about(
    world: scenes.World, names: Sequence[str], figures: dict[str, float], choice: Choice = SHIPPED
) -> dict[str, Any]:
    """The manifest but for its LoRAs. names: of LoRAs that it has; figures: the base's gates."""
    rng = random.Random("known")
    known = []
    for _ in range(KNOWN):
        subject = rng.choice(world.subjects)
        technique = rng.random() < scenes.TECHNIQUE_SHARE
        word = rng.choice(list(BASE_TECHNIQUES) if technique else world.sets_of[subject])
        known.append([scenes.prompt(subject, word), subject, word])
    subjects, styles = ([n for n in of if n in names] for of in (choice.designs, choice.styles))
    pairs = [*QUICK, *zip(subjects, styles, strict=False)]
    return {
        "checkpoint": CHECKPOINT,
        "judge": "weights/judge.safetensors",
        "size": SIZE,
        "atlas": world.atlas.digest,
        "designs": dict(choice.designs),
        "held_out": sorted(map(list, world.held_out)),
        "other_styles": list(OTHER_TECHNIQUES),
        "known": known,
        "unseen": [[scenes.prompt(subject), subject] for subject in style_subjects(world)[1]],
        "untold": [
            [s, w] for s in choice.designs for w in choice.styles if w in SETS and (s, w) not in world.atlas.number
        ],
        "quick": [*_there(pairs, names)][:2],
        "blocks": BLOCKS,
        "shown": {
            "pair": next(_there([SHOWN_PAIR, *pairs], names), []),
            "third": subjects[1] if len(subjects) > 1 else "",
            "whole": whole(names, choice),
            "new_style": "neon",
            "new_subject": "an apple",
        },
        "base_gates": figures,
    }
