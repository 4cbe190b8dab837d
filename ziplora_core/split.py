"""Inspiration Tree (arXiv 2305.18203), one split: a concept said by two words, each of which stands for a part of it.

Both words stand side by side in every prompt, so that training them is Textual Inversion with two vectors. From the
authors' code (github.com/google/inspiration_tree), where the paper leaves it open: the timesteps' weights
(`textual_inversion_decomposed.py`), the score, over pairs of different pictures of one word, the pictures' prompt being
the word alone (`seed_selection.py`). Unlike it: Adam without weight decay, one seed after another from one number on;
it also takes 8 pictures an update, at .004 in all, and trains the best seed on to 1000 steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from . import training
from .checks import Range
from .scores import alignment, consistency

TILT = 0.5  # a of `Settings.timestep`
DRAWS = 16  # steps that a seed's loss is measured over


@dataclass(frozen=True)
class Settings(training.Settings):
    """steps: of each seed. seeds: how many are tried, from `seed` on."""

    steps: int = 200
    learning_rate: float = 1e-3
    rank: int = 1
    batch_size: int = 2
    seeds: int = 4

    ranges: ClassVar[Mapping[str, Range]] = {**training.Settings.ranges, "seeds": Range(1, 64)}

    def timestep(self, fraction: float, timesteps: int) -> int:
        """Of p(t) ∝ 1 − a cos(πt/T), t from 0 to T − 1: more noise more often. By the inverse of its sums."""
        t = torch.arange(timesteps, dtype=torch.float64)
        sums = (1 - TILT * torch.cos(torch.pi * t / timesteps)).cumsum(0)
        return min(int(torch.searchsorted(sums, fraction * sums[-1], right=True)), timesteps - 1)

    def of(self, number: int) -> Settings:
        """For one of the seeds, counted from 0."""
        return replace(self, seed=(self.seed + number) % 2**64)

    @property
    def unseen(self) -> range:
        """Steps whose noise the first seed has not been trained on, to compare seeds by."""
        return range(self.steps, self.steps + DRAWS)


def halves(rows: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The left and the right word's own (1, width) of each text encoder's (2, width)."""
    return {key: t[:1].clone() for key, t in rows.items()}, {key: t[1:].clone() for key, t in rows.items()}


@dataclass(frozen=True)
class Score:
    """left, right: consistency of each word's pictures. between: mean cosine of the left's with the right's."""

    left: float
    right: float
    between: float

    @property
    def total(self) -> float:
        """C(l, l) + C(r, r) + min(C(l, l), C(r, r)) − C(l, r): each word always draws the same thing, not the
        other's."""
        return self.left + self.right + (min(self.left, self.right) - self.between)


def score(left: Tensor, right: Tensor) -> Score:
    """left, right: features of the pictures that each word draws, (pictures, d), two or more. Raises ValueError for
    fewer, and where the widths differ."""
    return Score(consistency(left), consistency(right), alignment(left, right).mean().item())
