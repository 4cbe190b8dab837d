"""Inspiration Tree's split: where its timesteps fall, the score written again, and the loss that seeds are told by."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from test_training import SHAPES, Network, pictures

from ziplora_core import split, training
from ziplora_core.trained_lora import TrainedLoRA


@pytest.mark.parametrize("timesteps", [1, 7, 1000])
def test_timesteps_follow_the_tilted_distribution(timesteps):
    """Each has its share of the unit interval, which is its weight; in between them the closed form's sums."""
    own, fine = split.Settings(), 4 * timesteps
    found = [own.timestep((i + 0.5) / fine, timesteps) for i in range(fine)]
    assert found == sorted(found) and {found[0], found[-1]} <= set(range(timesteps))
    weights = [1 - 0.5 * math.cos(math.pi * t / timesteps) for t in range(timesteps)]
    for t in {0, timesteps // 3, timesteps // 2, timesteps - 1}:
        share = found.count(t) / fine
        assert share == pytest.approx(weights[t] / sum(weights), abs=1.001 / fine)
    for u in (0.1, 0.5, 0.9):
        below = sum(t < u * timesteps for t in found) / fine
        assert below == pytest.approx(u - 0.5 * math.sin(math.pi * u) / math.pi, abs=1.5 / timesteps)


def test_the_ends_of_the_unit_interval_have_timesteps():
    own = split.Settings()
    assert (own.timestep(0.0, 1000), own.timestep(math.nextafter(1.0, 0.0), 1000)) == (0, 999)


def test_steps_are_drawn_so():
    rows = [r for i in range(150) for r in training.step_rows(pictures(), Network(), split.Settings(), i)]
    late = torch.cat([r.timesteps for r in rows]).float()
    assert late.mean().item() == pytest.approx(50 * (0.5 + 2 * 0.5 / math.pi**2), abs=1.0)


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def test_the_score_is_its_formula_over_pairs():
    left, right = (torch.randn(n, 5, generator=torch.Generator().manual_seed(n)) for n in (4, 3))
    within = [
        sum(cosine(a, b) for a, b in pairs) / len(pairs)
        for pairs in (list(itertools.combinations(side.tolist(), 2)) for side in (left, right))
    ]
    across = [cosine(a, b) for a in left.tolist() for b in right.tolist()]
    found = split.score(left, right)
    assert [found.left, found.right] == pytest.approx(within, abs=1e-5)
    assert found.between == pytest.approx(sum(across) / len(across), abs=1e-5)
    assert found.total == pytest.approx(sum(within) + min(within) - sum(across) / len(across), abs=1e-5)
    with pytest.raises(ValueError, match="two pictures or more, not of 1"):
        split.score(left[:1], right)


def test_the_loss_is_the_mean_over_steps_and_learns_nothing():
    trained, settings = TrainedLoRA(SHAPES, 2, 0), training.Settings(batch_size=3, seed=4)
    network, before = Network(), [t.detach().clone() for t in trained.tensors()]
    found = training.mean_loss(trained, network, pictures(), settings, range(5, 8))
    expected = 0.0
    for step in (5, 6, 7):
        for rows in training.step_rows(pictures(), network, settings, step):
            prediction, target = network(rows, trained.branch(rows))
            errors = ((prediction - target).detach().double() ** 2).flatten(1).mean(1)
            expected += float((errors * rows.weights).sum())
    assert found == pytest.approx(expected / 3, rel=1e-5)
    assert all(map(torch.equal, before, trained.tensors()))
    assert all(t.grad is None for t in trained.tensors())


def test_seeds_follow_one_another_and_the_loss_is_of_noise_that_the_first_has_not_seen():
    own = split.Settings(seed=2**64 - 2, seeds=3, steps=10)
    assert [own.of(i).seed for i in range(3)] == [2**64 - 2, 2**64 - 1, 0]
    assert list(own.unseen) == list(range(10, 26))


def test_halves_are_each_words_own():
    rows = {"clip_l": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    left, right = split.halves(rows)
    assert left["clip_l"].tolist() == [[1.0, 2.0]] and right["clip_l"].tolist() == [[3.0, 4.0]]
    assert left["clip_l"].untyped_storage().size() == 8
