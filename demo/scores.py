"""What to ask the miniature for, and how many of the pictures are right."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from .manifest import Asked, Manifest, Trained
from .truth import Truth, rights


@dataclasses.dataclass(frozen=True)
class Question:
    """What to ask for, and how many pictures of it."""

    asked: Asked
    count: int


@dataclasses.dataclass(frozen=True)
class Score:
    """How many of `count` pictures show the right subject, the right style, and both."""

    subject: int = 0
    style: int = 0
    both: int = 0
    count: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(
            self.subject + other.subject, self.style + other.style, self.both + other.both, self.count + other.count
        )

    def share(self, what: str) -> float:
        return float(getattr(self, what)) / max(self.count, 1)


def score(truth: Truth, pictures: Sequence[np.ndarray], asked: Asked) -> Score:
    """pictures: uint8, height x width x 3."""
    batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    found = rights(truth, batch, [asked] * len(pictures))
    return Score(*(sum(one[what] for one in found) for what in ("subject", "style", "both")), len(pictures))


def spread(count: int, over: int) -> list[int]:
    """`count` shared out over at most `over` parts, as evenly as whole numbers allow."""
    over = min(count, over)
    return [count // over + (i < count % over) for i in range(over)]


def base_questions(world: Manifest, count: int) -> list[Question]:
    """The base's own words."""
    shares = spread(count, len(world.known))
    return [Question(asked, pictures) for asked, pictures in zip(world.known, shares, strict=False)]


def alone_questions(world: Manifest, subject: Trained, count: int) -> list[Question]:
    """A subject's own prompt."""
    return [Question(world.alone(subject), count)]


def known_style_questions(world: Manifest, subject: Trained, count: int) -> list[Question]:
    """A subject in every style that the base knows and that its pictures lack."""
    shares = spread(count, len(world.other_styles))
    return [
        Question(world.restyled(subject, style), pictures)
        for style, pictures in zip(world.other_styles, shares, strict=False)
    ]


def unseen_questions(world: Manifest, style: Trained, count: int) -> list[Question]:
    """A new style on subjects that its LoRA's pictures do not show."""
    shares = spread(count, len(world.unseen))
    return [Question(world.on_unseen(style, number), pictures) for number, pictures in enumerate(shares)]


def pair_questions(world: Manifest, subject: Trained, style: Trained, count: int) -> list[Question]:
    """A subject in a new style: what a merge is for."""
    return [Question(Asked(world.prompt(subject, style), subject.name, style.name), count)]
