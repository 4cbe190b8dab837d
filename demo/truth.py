"""What the world knows of its own pictures: true ones of what is asked for, and what its judge says of drawn ones."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from . import judge
from .manifest import Asked, Manifest, Trained
from .world import atlas, scenes
from .world.concepts import PICTURE_TECHNIQUES
from .world.scenes import Scene
from .world.sets import BASE_SETS, SETS


def drawings(folder: Path) -> Path:
    """The drawings that ship with a miniature, or all of them beside one that is being trained."""
    shipped = folder / "drawings.safetensors"
    return shipped if shipped.exists() else folder / "atlas.safetensors"


class Truth:
    """A miniature's world. places: words of a prompt for where the object is.

    Raises FileNotFoundError where the judge or the drawings are missing.
    """

    places: Sequence[str] = scenes.PLACES

    def __init__(self, manifest: Manifest) -> None:
        self.designs = manifest.designs
        self.judge = judge.load(manifest.judge)
        self.atlas = atlas.load(drawings(manifest.folder))

    def scene(self, subject: str, style: str | None, rng: random.Random) -> Scene:
        """A subject that a LoRA teaches is its design; any other is drawn in one of the base's sets by lot."""
        if style in SETS:
            return scenes.set_out(subject, style, None, rng)
        word = self.designs.get(subject)
        if word is None:
            known = [w for w in self.atlas.sets_of(subject) if w in BASE_SETS]
            word = rng.choice([w for w in known if not SETS[w].one_color] if style else known)
        return scenes.set_out(subject, word, style, rng)

    def pictures(
        self, subject: str, style: str | None, count: int, rng: random.Random, place: str | None = None
    ) -> Tensor:
        """True pictures, B3HW in 0..1: a subject (a LoRA's, or one that the base knows) in a style (likewise; None: as
        the subject's own pictures are), at a place where one is named."""
        found: list[Scene] = []
        while len(found) < count:
            scene = self.scene(subject, style, rng)
            if place is None or scenes.place(scene) == place:
                found.append(scene)
        return scenes.render(self.atlas, found)

    def more(self, trained: Trained, count: int, rng: random.Random) -> Tensor:
        """True pictures of what a LoRA's first prompt asks for, which it was not taught with."""
        style = PICTURE_TECHNIQUES[0] if trained.kind == "content" else trained.name
        ground = re.search(r"on an? (\w+) ground", trained.learned.prompt)
        found = [self.scene(trained.shows, style, rng) for _ in range(count)]
        return scenes.render(self.atlas, [replace(scene, ground=ground[1]) if ground else scene for scene in found])

    def answers(self, pictures: Tensor) -> dict[str, list[str]]:
        """The judge's likeliest word per picture, by "subject", "style", "place" and "ground"."""
        said = self.judge.answers(pictures)
        designs = said.pop("design")
        # A subject that has a design is that design or another drawing of it; the judge has a head for these alone.
        kinds = judge.kinds(self.designs)
        subjects = [d if d in kinds else s for d, s in zip(designs, said["subject"], strict=True)]
        return {**said, "subject": subjects}

    def same(self, said: str, asked: Asked) -> bool:
        """Whether the judge's word for a subject is right of what was asked for.

        In the style of a set, that set's own drawing is right: another one than the design. So is any where the design
        is not asked for: the base knows the subject from others alone.
        """
        another = asked.style in SETS or not asked.design
        return said == asked.subject or (another and said == f"{judge.ANOTHER}{asked.subject}")

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        """The judge's last layer, B x F, for distances."""
        found = []
        for part in pictures.float().split(64):
            last = self.judge.features(part)[-1]
            found.append(torch.cat([last.mean((2, 3)), last.amax((2, 3))], dim=1))
        return torch.cat(found)


def rights(truth: Truth, pictures: Tensor, asked: Sequence[Asked]) -> list[dict[str, bool]]:
    """Per picture, whether subject and style are right ("both": at once); what is not asked for is right."""
    said = truth.answers(pictures)
    found = []
    for number, wanted in enumerate(asked):
        subject = wanted.subject is None or truth.same(said["subject"][number], wanted)
        style = wanted.style in (None, said["style"][number])
        found.append({"subject": subject, "style": style, "both": subject and style})
    return found


def shares(found: Sequence[dict[str, bool]]) -> dict[str, float]:
    """Shares of what is right."""
    return {name: sum(one[name] for one in found) / max(1, len(found)) for name in ("subject", "style", "both")}
