"""Paired differences between two methods over subjects x styles, with intervals that know what pairs share.

Pairs that share a LoRA are not independent: what is drawn again is the subjects and the styles, not the pairs.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import torch

Pair = tuple[str, str]  # subject, style
ROUNDS = 10_000


@dataclass(frozen=True)
class Difference:
    """Mean over the pairs, its 95 % interval, pairs better, equal and worse, and the sign test's two-sided p."""

    mean: float
    low: float
    high: float
    better: int
    equal: int
    worse: int
    p: float

    def __str__(self) -> str:
        pairs = self.better + self.equal + self.worse
        return (
            f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}], better in {self.better}, equal in {self.equal}, "
            f"worse in {self.worse} of {pairs} pairs, sign test p {self.p:.2g}"
        )


def bootstrap(values: Mapping[Pair, float], rounds: int = ROUNDS, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of paired differences: subjects and styles drawn again, each with replacement.

    The two-way cluster bootstrap for crossed random factors (Owen, "The pigeonhole bootstrap", 2007), which is a
    little wider than exact. A pair counts as often as its subject times as often as its style was drawn.
    """
    subjects, styles = (sorted({pair[i] for pair in values}) for i in (0, 1))
    table, there = torch.zeros(2, len(subjects), len(styles), dtype=torch.float64)
    for (subject, style), value in values.items():
        at = subjects.index(subject), styles.index(style)
        table[at], there[at] = value, 1.0
    generator = torch.Generator().manual_seed(seed)

    def drawn(count: int) -> torch.Tensor:
        picks = torch.randint(count, (rounds, count), generator=generator)
        return torch.zeros(rounds, count, dtype=torch.float64).scatter_add_(1, picks, torch.ones_like(picks).double())

    rows, columns = drawn(len(subjects)), drawn(len(styles))
    weight = torch.einsum("rs,st,rt->r", rows, there, columns)
    total = torch.einsum("rs,st,rt->r", rows, table * there, columns)
    means = (total / weight)[weight > 0]
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def sign_test(better: int, worse: int) -> float:
    """Two-sided p of as uneven a split, were both as likely. Treats pairs as independent: a guide, not a proof."""
    count = better + worse
    if not count:
        return 1.0
    tail = sum(math.comb(count, k) for k in range(min(better, worse) + 1)) / 2**count
    return min(1.0, 2 * tail)


def difference(mine: Mapping[Pair, float], theirs: Mapping[Pair, float], sign: int = 1) -> Difference:
    """Mine less theirs over the pairs that both have; sign -1 where less is better (then better counts less).

    Raises ValueError where no pair is in both.
    """
    values = {pair: mine[pair] - theirs[pair] for pair in mine if pair in theirs}
    if not values:
        raise ValueError("no pair was measured with both methods")
    low, high = bootstrap(values)
    better, worse = (sum(s * v > 1e-9 for v in values.values()) for s in (sign, -sign))
    equal = len(values) - better - worse
    return Difference(statistics.mean(values.values()), low, high, better, equal, worse, sign_test(better, worse))


def components(values: Mapping[Pair, float]) -> dict[str, float]:
    """Variance of differences over a full table, parted into subject, style and what is left (method of moments)."""
    subjects, styles = (sorted({pair[i] for pair in values}) for i in (0, 1))
    table = torch.tensor([[values[s, t] for t in styles] for s in subjects], dtype=torch.float64)
    n, m = table.shape
    whole, rows, columns = table.mean(), table.mean(1), table.mean(0)
    left = float((table - rows[:, None] - columns + whole).square().sum() / ((n - 1) * (m - 1)))
    by_subject = max(0.0, (float(rows.var()) * m - left) / m)
    by_style = max(0.0, (float(columns.var()) * n - left) / n)
    return {"subject": by_subject, "style": by_style, "left": left}


def power(parts: Mapping[str, float], effect: float, subjects: int, styles: int, rounds: int = 20_000) -> float:
    """How often a 95 % interval would be clear of zero, were the true mean difference `effect`. parts: `components`."""
    rng = random.Random(0)
    error = math.sqrt(parts["subject"] / subjects + parts["style"] / styles + parts["left"] / (subjects * styles))
    if error == 0:
        return float(effect != 0)
    return sum(abs(rng.gauss(effect, error)) > 1.96 * error for _ in range(rounds)) / rounds
