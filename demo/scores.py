"""What to ask the miniature for, and how many of the pictures the judge calls right."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import numpy as np
import torch

from .judge import Judge
from .manifest import Manifest, Trained

PLAIN = "flat"  # the style that a subject alone is asked for in


@dataclasses.dataclass(frozen=True)
class Question:
    """One prompt, how many pictures of it, and what would be right: the judge's classes (None: not asked)."""

    prompt: str
    count: int
    shape: str | None
    style: str | None


@dataclasses.dataclass(frozen=True)
class Score:
    """How many of `count` pictures show the right shape, the right style, and both."""

    shape: int = 0
    style: int = 0
    both: int = 0
    count: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(
            self.shape + other.shape, self.style + other.style, self.both + other.both, self.count + other.count
        )

    def share(self, what: str) -> float:
        return float(getattr(self, what)) / max(self.count, 1)


def score(judge: Judge, pictures: Sequence[np.ndarray], question: Question) -> Score:
    """pictures: uint8, height x width x 3. A picture is right where the right class is the most likely one."""
    batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    shape = judge.right(batch, shape=question.shape)
    style = judge.right(batch, style=question.style)
    return Score(int(shape.sum()), int(style.sum()), int((shape & style).sum()), len(pictures))


def spread(count: int, over: int) -> list[int]:
    """`count` shared out over at most `over` parts, as evenly as whole numbers allow."""
    over = min(count, over)
    return [count // over + (i < count % over) for i in range(over)]


def base_questions(world: Manifest, count: int) -> list[Question]:
    """Shapes and styles that the base knows, every style once, leaving out pairs that it never saw."""
    rng = random.Random(1234)
    asked = []
    for number, pictures in enumerate(spread(count, len(world.known_styles))):
        style = world.known_styles[number % len(world.known_styles)]
        shape = rng.choice([s for s in world.shapes if (s, style) not in world.held_out])
        asked.append(Question(f"a {rng.choice(world.colours)} {shape} in {style} style", pictures, shape, style))
    return asked


def alone_questions(subject: Trained, count: int) -> list[Question]:
    """A subject's own prompt."""
    return [Question(subject.gates["alone"], count, subject.name, PLAIN)]


def known_style_questions(world: Manifest, subject: Trained, count: int) -> list[Question]:
    """A subject in every style that the base knows and that its pictures lack."""
    styles = [style for style in world.known_styles if style not in world.subject_picture_styles]
    ask = subject.gates["in_known_style"]
    return [
        Question(ask.format(style=style), pictures, subject.name, style)
        for style, pictures in zip(styles, spread(count, len(styles)), strict=False)
    ]


def unseen_shape_questions(world: Manifest, style: Trained, count: int) -> list[Question]:
    """A new style on shapes that its LoRA's pictures do not show."""
    rng = random.Random(1000)
    asked = []
    for number, pictures in enumerate(spread(count, 2 * len(world.unseen_shapes))):
        shape = world.unseen_shapes[number % len(world.unseen_shapes)]
        prompt = style.gates["unseen_shapes"].format(shape=shape, colour=rng.choice(world.colours))
        asked.append(Question(prompt, pictures, shape, style.name))
    return asked


def pair_questions(world: Manifest, subject: Trained, style: Trained, count: int) -> list[Question]:
    """A subject in a new style: what a merge is for."""
    return [Question(world.prompt(subject, style), count, subject.name, style.name)]
