"""The whole layer-wise solve: what it solves, on which noise, and how much of it is kept at once."""

from __future__ import annotations

import pytest
import torch
from test_layerwise import Watched, outputs, positions, wanted
from toys import SHAPES, Dense, ToyPredictor, factors, of_two, toy_pair, toy_references

from ziplora_core import layerwise, shares
from ziplora_core.branch import JoinedSet
from ziplora_core.lora_set import CONCEPTS, LoRASet
from ziplora_core.retention import measure_retention


@pytest.mark.parametrize("ridge", [0.02, 2.0])
def test_each_layer_is_the_dense_ridge_solution_of_relative_errors(ridge):
    joined, predictor = JoinedSet(toy_pair(), dtype=torch.float64), Watched()
    found = layerwise.merge(joined, predictor, toy_references(), 3, ridge=ridge)
    predictor.seen = predictor.seen[len(SHAPES) :]  # the first pass only tells inputs apart
    for name in SHAPES:
        rows, targets = [], []
        for concept in CONCEPTS:
            own = wanted(joined, name, concept)
            dense = outputs(joined, predictor, name, concept) / positions(predictor, name, concept) ** 0.5
            other = torch.ones_like(own) if bool(own.all()) else 1 - own
            dense = dense / (dense @ other).norm() if bool((dense @ other).norm() > 0) else dense * 0
            rows.append(dense)
            targets.append(dense @ own)
        size = rows[0].shape[1]
        pull = (ridge * sum(r.square().sum() for r in rows) / size) ** 0.5
        rows.append(pull * torch.eye(size, dtype=torch.float64))
        known = shares.layer_coefficients([f for _, f in joined.loras.layers[name].items()])
        targets.append(pull * torch.cat(known).double())
        expected = torch.linalg.lstsq(torch.cat(rows), torch.cat(targets)[:, None]).solution[:, 0]
        got = torch.cat([found[c][name] for c, _ in joined.loras.layers[name].items()])
        torch.testing.assert_close(got.double(), expected, rtol=2e-3, atol=2e-3)


def test_noise_is_the_seeds_spread_over_the_schedule_and_never_that_of_measuring():
    joined, references = JoinedSet(toy_pair(), dtype=torch.float64), toy_references()

    class Noises(ToyPredictor):
        def __init__(self):
            super().__init__()
            self.noise, self.eighths = [], set()

        def __call__(self, batch, branch):
            self.noise.append(batch.noise.flatten())
            self.eighths |= {int(t) * 8 // self.timesteps for t in batch.timesteps}
            return super().__call__(batch, branch)

    def noise(work):
        predictor = Noises()
        work(predictor)
        return torch.cat(predictor.noise), predictor.eighths

    ones = [joined.unflatten(torch.ones(joined.loras.coefficient_count))]
    first, eighths = noise(lambda p: layerwise.merge(joined, p, references, 0))
    second, _ = noise(lambda p: layerwise.merge(joined, p, references, 1))
    measured, _ = noise(lambda p: measure_retention(joined, p, references, ones, 0))
    assert eighths == set(range(8))
    assert all(torch.isin(first, other).float().mean() < 0.01 for other in (second, measured))


def test_layers_that_take_no_part_keep_what_the_weights_alone_say():
    pair = toy_pair()

    class Forgetful(ToyPredictor):
        def __call__(self, batch, branch):
            class Some:
                def layer(self, name, x, base, **options):
                    if name in ("first", "only content", "only style"):
                        return base.forward(x)
                    return branch.layer(name, x, base, **options)

            return super().__call__(batch, Some())

    found = layerwise.merge(JoinedSet(pair, dtype=torch.float64), Forgetful(), toy_references(), 0)
    for concept in CONCEPTS:
        side = found[concept]
        assert set(side) == {n for n, layer in pair.layers.items() if layer.get(concept) is not None}
        for name, m in side.items():
            known = shares.merge(pair)[concept][name]
            assert torch.equal(m, known) == (name in ("first", f"only {concept}")), name


@pytest.mark.parametrize("groups", [1, 2, 10])
def test_no_more_moments_are_kept_at_once_than_fit(monkeypatch, groups):
    kept = []

    class Counted(layerwise.Moments):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            kept.append(self)

    monkeypatch.setattr(layerwise, "Moments", Counted)
    joined, predictor = JoinedSet(toy_pair(), dtype=torch.float64), ToyPredictor()
    whole = layerwise.moments_at_most(joined.loras)
    budget = whole // groups
    layerwise.merge(joined, predictor, toy_references(), 0, budget=budget)
    sizes = [[seen.total.numel() * 4 for seen in moments.sums.values()] for moments in kept]
    assert sizes[0] == [], "telling inputs apart keeps nothing"
    largest = max(size for each in sizes for size in each) * len(CONCEPTS)
    assert all(sum(each) <= max(budget, largest) for each in sizes)
    assert sum(map(sum, sizes)) <= whole and len(kept) == predictor.calls // 8 + 1


def test_an_input_that_was_changed_in_place_is_another():
    joined = JoinedSet(toy_pair(), dtype=torch.float64)
    joined.layers["again"] = joined.layers["third"] = joined.layers["first"]
    moments = layerwise.Moments(frozenset({"first", "again", "third"}))
    branch = layerwise.RecordingBranch(joined, torch.tensor([0, 1]), moments)
    base, x = Dense(ToyPredictor().weights["first"]), torch.ones(2, 5, dtype=torch.float64)
    branch.layer("first", x, base)
    branch.layer("again", x, base)
    x.mul_(3)
    branch.layer("third", x, base)
    assert moments.source == {"first": "first", "again": "first", "third": "third"}
    assert moments.sums["third", "style"].mean[0, 0] == 9 * moments.sums["first", "style"].mean[0, 0]


def test_a_large_convolution_is_sampled():
    """Each sampled position is one of the dense output's, and they are enough and not too many."""
    layer = of_two(factors((5, 3, 3, 3), 2, 0, 0.7), factors((5, 3, 3, 3), 3, 1, 1.3))
    joined = JoinedSet(LoRASet(CONCEPTS, {"conv": layer}))
    x = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    form, count = layerwise._convolution_form(joined.layers["conv"], x, padding=1)
    assert 2 * 64 <= count < 4 * 64
    columns = []
    for _, f in layer.items():
        delta = (f.scale * torch.einsum("or,ri...->oi...", f.up, f.down)).float()
        for j in range(3):
            one = torch.zeros_like(delta)
            one[:, j] = delta[:, j]
            columns.append(torch.nn.functional.conv2d(x, one, padding=1).flatten(2)[:, :, :: 1600 // 64])
    dense = torch.stack(columns, -1).flatten(0, 2)
    assert dense.shape[0] == 5 * count
    torch.testing.assert_close(form, dense.T @ dense, rtol=1e-3, atol=1e-3)


def test_nothing_is_left_to_take_away_where_the_direct_merge_has_no_error():
    none = layerwise.Quadratic(torch.zeros(3, 3), torch.zeros(3), 0.0)
    assert none.left(torch.zeros(3)) == 1.0
