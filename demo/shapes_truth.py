"""The first world's truth: scenes that its own code draws, and three small judges."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from . import world
from .concepts import PLAIN
from .judge import load_judge
from .manifest import Asked, Manifest, Trained
from .miniature import FIRST


class ShapesTruth:
    """`demo.truth.Truth` of shapes."""

    places: Sequence[str] = world.PLACES
    build = FIRST

    def __init__(self, manifest: Manifest) -> None:
        self.judge = load_judge(str(manifest.judge))

    def pictures(
        self, subject: str, style: str | None, count: int, rng: random.Random, place: str | None = None
    ) -> Tensor:
        scenes: list[world.Scene] = []
        while len(scenes) < count:
            if subject in world.SUBJECTS:
                scene = world.subject_scene(subject, style or PLAIN, rng)
            else:
                scene = world.shape_scene(subject, rng.choice(list(world.COLOURS)), style or PLAIN, rng)
            if place is None or world.place(scene) == place:
                scenes.append(scene)
        return world.render(scenes)

    def more(self, trained: Trained, count: int, rng: random.Random) -> Tensor:
        if trained.kind == "content":
            return self.pictures(trained.name, PLAIN, count, rng)
        color = trained.learned.prompt.split()[1]
        return world.render([world.shape_scene(trained.shows, color, trained.name, rng) for _ in range(count)])

    def answers(self, pictures: Tensor) -> dict[str, list[str]]:
        judged = self.judge.scores(pictures)
        names = {"subject": self.judge.shape_names, "style": self.judge.style_names, "place": world.PLACES}
        probable: dict[str, Tensor] = {"subject": judged["shape"], "style": judged["style"], "place": judged["place"]}  # type: ignore[dict-item]
        return {head: [names[head][i] for i in found.argmax(-1).tolist()] for head, found in probable.items()}

    def same(self, said: str, asked: Asked) -> bool:
        return said == asked.subject

    def features(self, pictures: Tensor) -> Tensor:
        found = self.judge.scores(pictures)["features"]
        assert isinstance(found, torch.Tensor)
        return found
