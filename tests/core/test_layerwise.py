"""The layer-wise solve against dense algebra in float64, on layers small enough to write out."""

from __future__ import annotations

import pytest
import torch
from toys import SHAPES, Dense, ToyPredictor, toy_pair, toy_references

from ziplora_core import layerwise
from ziplora_core.branch import JoinedSet
from ziplora_core.coefficients import Coefficients
from ziplora_core.draws import spread_batches
from ziplora_core.lora_set import CONCEPTS
from ziplora_core.retention import measure_retention


class Watched(ToyPredictor):
    """A toy network that keeps what each layer saw and was asked."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __call__(self, batch, branch):
        watched = self

        class Spy:
            def layer(self, name, x, base, **options):
                watched.seen.append((name, batch.concept == 1, x))
                return branch.layer(name, x, base, **options)

        return super().__call__(batch, Spy())


@pytest.fixture
def recorded():
    joined, predictor = JoinedSet(toy_pair(), dtype=torch.float64), Watched()
    moments = layerwise.Moments(frozenset(joined.layers))
    for batches in spread_batches(toy_references(), predictor, seed=0, draws=6):
        for batch in batches:
            predictor(batch, layerwise.RecordingBranch(joined, batch.concept, moments))
    return joined, predictor, moments


def outputs(joined, predictor, name, concept):
    """One row for each output number of a layer under a reference, one column for each coefficient: dense."""
    layer = joined.loras.layers[name]
    rows = []
    for seen, is_style, x in predictor.seen:
        if seen != name:
            continue
        x = x[is_style] if concept == "style" else x[~is_style]
        columns = []
        for _, f in layer.items():
            delta = f.scale * torch.einsum("or,ri...->oi...", f.up, f.down)
            for j in range(f.columns):
                one = torch.zeros_like(delta)
                one[:, j] = delta[:, j]
                y = torch.nn.functional.conv2d(x, one, padding=1) if x.ndim == 4 else x @ one.T
                columns.append(y.flatten())
        rows.append(torch.stack(columns, dim=1))
    return torch.cat(rows)


def wanted(joined, name, concept):
    """What a concept's own LoRA has as coefficients: ones for itself, zeros for the other."""
    layer = joined.loras.layers[name]
    return torch.cat([torch.full((f.columns,), float(c == concept), dtype=torch.float64) for c, f in layer.items()])


def positions(predictor, name, concept):
    """Samples that the moments are a mean over."""
    chosen = [(x[s] if concept == "style" else x[~s]) for n, s, x in predictor.seen if n == name]
    return sum(x.shape[0] * (x[0, 0].numel() if x.ndim == 4 else x[0].numel() // x.shape[-1]) for x in chosen)


@pytest.mark.parametrize("name", SHAPES)
def test_forms_are_the_outputs_squared(recorded, name):
    joined, predictor, moments = recorded
    for concept in CONCEPTS:
        dense = outputs(joined, predictor, name, concept)
        expected = dense.T @ dense / positions(predictor, name, concept)
        form = moments.forms(name, joined.layers[name])[concept].double()
        torch.testing.assert_close(form, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("ridge", [1e-3, 0.1])
def test_solution_is_the_dense_least_squares_one(recorded, name, ridge):
    joined, predictor, moments = recorded
    weights = {"content": 0.7, "style": 2.1}
    forms = moments.forms(name, joined.layers[name])
    problem = layerwise.quadratic(joined.layers[name], forms, weights)
    found = layerwise.solve(problem, ridge).double()
    rows, targets = [], []
    for concept in CONCEPTS:
        scale = (weights[concept] / positions(predictor, name, concept)) ** 0.5
        dense = outputs(joined, predictor, name, concept)
        rows.append(scale * dense)
        targets.append(scale * dense @ wanted(joined, name, concept))
    pull = (ridge * sum((r * r).sum() for r in rows) / len(found)) ** 0.5
    rows.append(pull * torch.eye(len(found), dtype=torch.float64))
    targets.append(pull * torch.ones(len(found), dtype=torch.float64))
    expected = torch.linalg.lstsq(torch.cat(rows), torch.cat(targets)[:, None]).solution[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", SHAPES)
def test_error_at_the_direct_merge(recorded, name):
    joined, predictor, moments = recorded
    forms = moments.forms(name, joined.layers[name])
    found = layerwise.error_at_direct(joined.layers[name], forms)
    for concept in CONCEPTS:
        dense = outputs(joined, predictor, name, concept)
        own = wanted(joined, name, concept)
        other = torch.ones_like(own) if bool(own.all()) else 1 - own  # alone in its layer: its own effect
        expected = (dense @ other).square().sum() / positions(predictor, name, concept)
        assert found[concept] == pytest.approx(expected.item(), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_left_of_a_layers_error(recorded, name):
    joined, predictor, moments = recorded
    weights = {"content": 0.7, "style": 2.1}
    problem = layerwise.quadratic(joined.layers[name], moments.forms(name, joined.layers[name]), weights)
    at = torch.linspace(-0.5, 1.5, len(problem.b))
    errors = []
    for z in (at, torch.ones_like(at)):
        parts = []
        for concept in CONCEPTS:
            off = outputs(joined, predictor, name, concept) @ (z.double() - wanted(joined, name, concept))
            parts.append(weights[concept] * off.square().sum() / positions(predictor, name, concept))
        errors.append(sum(parts).item())
    assert problem.left(at) == pytest.approx(errors[0] / errors[1], rel=1e-3)


def test_layers_with_one_input_share_its_moments():
    pair = toy_pair()
    joined = JoinedSet(pair, dtype=torch.float64)
    moments = layerwise.Moments(frozenset({"first", "second"}))
    branch = layerwise.RecordingBranch(joined, torch.tensor([0, 1]), moments)
    x = torch.randn(2, 5, dtype=torch.float64)
    weights = ToyPredictor().weights
    branch.layer("first", x, Dense(weights["first"]))
    branch.layer("second", torch.randn(2, 7, dtype=torch.float64), Dense(weights["second"]))
    joined.layers["again"] = joined.layers["first"]
    moments.names |= {"again"}
    branch.layer("again", x, Dense(weights["first"]))
    assert moments.source == {"first": "first", "second": "second", "again": "first"}
    assert set(moments.sums) == {(n, c) for n in ("first", "second") for c in CONCEPTS}


def test_all_moments_take_no_more_than_is_said(recorded):
    joined, _, moments = recorded
    taken = sum(seen.total.numel() * 4 for seen in moments.sums.values())
    assert 0.5 * layerwise.moments_at_most(joined.loras) <= taken <= layerwise.moments_at_most(joined.loras)


def test_in_groups_or_at_once_is_the_same_merge():
    joined = JoinedSet(toy_pair(), dtype=torch.float64)
    seen = []
    merges = [
        layerwise.merge(joined, ToyPredictor(), toy_references(), 3, seen.append, budget=budget)
        for budget in (1, 2**30)
    ]
    for side in ("content", "style"):
        for name, m in merges[0][side].items():
            torch.testing.assert_close(m, merges[1][side][name])
    assert [(s.index, s.layers) for s in seen] == [(i + 1, len(SHAPES)) for i in range(len(SHAPES))] * 2
    assert {s.name for s in seen} == set(SHAPES)


def test_merge_keeps_both_better_than_the_direct_merge():
    joined, predictor, references = JoinedSet(toy_pair(), dtype=torch.float64), ToyPredictor(), toy_references()
    found = layerwise.merge(joined, predictor, references, seed=0, ridge=0.1)
    before, after = measure_retention(joined, predictor, references, [Coefficients.ones(joined.loras), found], seed=0)
    assert after["content"] + after["style"] < 0.8 * (before["content"] + before["style"])


def test_numbers_that_overflow_are_refused_by_the_name_of_their_layer():
    joined, predictor, references = JoinedSet(toy_pair(), dtype=torch.float64), ToyPredictor(), toy_references()
    joined.layers["second"].up[:] = float("inf")
    with pytest.raises(FloatingPointError, match="second.*not finite"):
        layerwise.merge(joined, predictor, references, seed=0)


@pytest.mark.parametrize(("ridge", "spread"), [(1.0, 1.0), (0.1, 3.0), (1e-6, 12.0)])
def test_the_solution_is_float64s_whatever_it_is_factored_in(ridge, spread):
    """Down to a condition at which float32 alone has no digit left."""
    g = torch.Generator().manual_seed(0)
    n = 40
    basis = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64)).Q
    q = (basis * torch.logspace(-spread / 2, spread / 2, n, dtype=torch.float64)) @ basis.T
    q, b = (q + q.T) / 2, torch.randn(n, generator=g, dtype=torch.float64)
    shift = ridge * q.diagonal().mean()
    exact = torch.linalg.solve(q + shift * torch.eye(n, dtype=torch.float64), b + shift)
    found = layerwise.solve(layerwise.Quadratic(q, b, 0.0), ridge)
    assert (found - exact).norm() < 1e-8 * exact.norm()


def test_what_float32_cannot_factor_is_factored_in_float64():
    q = torch.diag(torch.tensor([1.0, 1e-14], dtype=torch.float64))
    mixed = torch.tensor([[1.0, 1.0 - 1e-10], [1.0 - 1e-10, 1.0]], dtype=torch.float64)
    assert layerwise._refined(mixed, torch.ones(2, dtype=torch.float64)) is None
    assert layerwise._refined(q / q, torch.ones(2, dtype=torch.float64)) is None
    problem = layerwise.Quadratic(mixed, torch.tensor([1.0, 0.5], dtype=torch.float64), 0.0)
    exact = torch.linalg.solve(mixed + 1e-9 * torch.eye(2, dtype=torch.float64), problem.b + 1e-9)
    assert (layerwise.solve(problem, 1e-9) - exact).norm() < 1e-5 * exact.norm()
