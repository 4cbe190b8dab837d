"""What a world knows of its own pictures: true ones of what is asked for, and what its judge says of drawn ones."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from .manifest import Asked, Manifest, Trained
from .miniature import Build


class Truth(Protocol):
    """The same questions to either world.

    places: words of a prompt for where the object is. build: what its miniature is built from.
    """

    places: Sequence[str]
    build: Build

    def pictures(
        self, subject: str, style: str | None, count: int, rng: random.Random, place: str | None = None
    ) -> Tensor:
        """True pictures, B3HW in 0..1: a subject (a LoRA's, or one that the base knows) in a style (likewise; None: as
        the subject's own pictures are), at a place where one is named."""
        ...

    def more(self, trained: Trained, count: int, rng: random.Random) -> Tensor:
        """True pictures of what a LoRA's first prompt asks for, which it was not taught with."""
        ...

    def answers(self, pictures: Tensor) -> dict[str, list[str]]:
        """The judge's likeliest word per picture, by "subject", "style" and "place"."""
        ...

    def same(self, said: str, asked: Asked) -> bool:
        """Whether the judge's word for a subject is right of what was asked for."""
        ...

    def features(self, pictures: Tensor) -> Tensor:
        """The judge's last layers, B x F, for distances."""
        ...


def open_truth(manifest: Manifest) -> Truth:
    """The truth of a miniature's world. Raises FileNotFoundError where its judge is missing."""
    if manifest.world == "art":
        from .art.truth import ArtTruth

        return ArtTruth(manifest)
    from .shapes_truth import ShapesTruth

    return ShapesTruth(manifest)


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
