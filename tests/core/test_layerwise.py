"""The layer-wise solve against dense algebra in float64, on layers small enough to write out."""

from __future__ import annotations

import pytest
import torch
from toys import SHAPES, Dense, ToyPredictor, Watched, references_of, toy_pair, toy_references, toy_set

from ziplora_core import layerwise, shares
from ziplora_core.branch import JoinedSet
from ziplora_core.coefficients import Coefficients
from ziplora_core.lora_set import CONCEPTS
from ziplora_core.retention import measure_retention


def solved(loras):
    """(joined, what its layers saw, the merge, what was told of each layer)"""
    joined, predictor, told = JoinedSet(loras, dtype=torch.float64), Watched(), []
    found = layerwise.merge(joined, predictor, references_of(loras.concepts), 3, told.append, ridge=0.2)
    return joined, predictor, found, told


def deltas(joined, name):
    """ΔW of each LoRA of a layer, (rows, columns) float64: what belongs to a column in one axis."""
    return {
        concept: (f.scale * torch.einsum("or,ri...->oi...", f.up, f.down)).movedim(1, -1).flatten(0, -2)
        for concept, f in joined.loras.layers[name].items()
    }


def as_least_squares(joined, predictor, name, ridge):
    """Rows and targets of the sum that `shares` states, one column of the update after the other; the ridge's last."""
    parts = deltas(joined, name)
    places = {c: joined.concepts.index(c) for c in parts}
    active = {c: predictor.features(name, places[c]).square().mean(0) for c in parts}
    weights = {}
    for c, d in parts.items():
        sizes = {o: parts[o].square().sum() for o in parts if o != c}
        added = sum(size * (active[o] * d.square().sum(0)).sum() for o, size in sizes.items())
        weights[c] = added / sum(sizes.values())
    size = sum(weights[c] * active[c] for c in parts) * torch.stack([d.square().sum(0) for d in parts.values()])
    for j in range(len(size[0])):
        columns = torch.stack([d[:, j] for d in parts.values()], dim=1)
        rows = [(weights[c] * active[c][j]).sqrt() * columns for c in parts]
        targets = [(weights[c] * active[c][j]).sqrt() * parts[c][:, j] for c in parts]
        pull = (ridge * size.mean()).sqrt()
        yield rows + [pull * torch.eye(len(parts)).double()], targets + [pull * torch.ones(len(parts)).double()]


BOTH = [name for name in SHAPES if not name.startswith("only")]


@pytest.mark.parametrize("loras", [toy_pair(), toy_set(3), toy_set(5)], ids=["2", "3", "5"])
@pytest.mark.parametrize("name", BOTH)
def test_each_layer_is_the_dense_ridge_solution_of_relative_errors(loras, name):
    joined, predictor, found, told = solved(loras)
    expected, errors = [], torch.zeros(2, dtype=torch.float64)  # at the solution, at the direct merge
    for rows, targets in as_least_squares(joined, predictor, name, 0.2):
        z = torch.linalg.lstsq(torch.cat(rows), torch.cat(targets)[:, None]).solution[:, 0]
        expected.append(z)
        for at, m in enumerate((z, torch.ones_like(z))):
            errors[at] += sum((r @ m - t).square().sum() for r, t in zip(rows[:-1], targets[:-1], strict=True))
    expected = torch.stack(expected, 1)
    got = torch.stack([found[c][name] for c in loras.layers[name]]).double()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert (got - 1).abs().max() > 0.1, "near the direct merge the comparison shows little"
    (left,) = [layer.relative_error for layer in told if layer.name == name]
    assert left == pytest.approx((errors[0] / errors[1]).item(), rel=1e-4)


def test_a_feature_that_only_one_reference_uses_goes_to_its_lora():
    """Two LoRAs of one size that fill different outputs; feature 0 is the content's, 1 the style's, 2 both's."""
    grams = torch.eye(2, dtype=torch.float64).expand(3, 2, 2)
    active = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    v = shares.shares(grams, active)
    torch.testing.assert_close(v / v.sum(1, keepdim=True), torch.tensor([[1, 0], [0, 1], [0.5, 0.5]]).double())


def test_layers_of_one_lora_stay_and_every_layer_is_told_of():
    joined, _, found, told = solved(toy_pair())
    for concept in CONCEPTS:
        assert torch.equal(found[concept][f"only {concept}"], torch.ones(SHAPES[f"only {concept}"][1]))
        wanted = [n for n, layer in joined.loras.layers.items() if concept in layer]
        assert list(found[concept]) == wanted
    assert [(s.name, s.index, s.layers) for s in told] == [(n, i, len(SHAPES)) for i, n in enumerate(SHAPES, 1)]
    assert [s.relative_error for s in told if s.name.startswith("only")] == [1.0, 1.0]


def test_it_takes_eight_passes_and_keeps_a_number_for_each_coefficient():
    joined, predictor = JoinedSet(toy_pair(), dtype=torch.float64), ToyPredictor()
    activity = layerwise.record(joined, predictor, toy_references(), 0)
    assert predictor.calls == layerwise.DRAWS == 8
    both = 2 * sum(layer.columns for layer in joined.layers.values())
    assert sum(sums.numel() for sums in activity.sums.values()) == both
    assert {sums.dtype for sums in activity.sums.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squares_that_half_precision_cannot_hold_are_added_up_in_float32(dtype):
    activity, x = layerwise.Activity(), torch.full((2, 3, 4), 3000.0, dtype=dtype)
    activity.add("layer", "content", x)
    activity.add("layer", "content", x / 3)
    value = x[0, 0, 0].double()
    expected = (value**2 + (x / 3)[0, 0, 0].double() ** 2) / 2
    torch.testing.assert_close(activity.of("layer", ["content"]).double(), expected.expand(4, 1), rtol=1e-5, atol=0)
    assert activity.of("layer", ["content", "style"]) is None


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


def test_layers_that_take_no_part_are_shared_out_by_the_weights_alone():
    pair = toy_pair()

    class Forgetful(ToyPredictor):
        def __call__(self, batch, branch):
            class Some:
                def layer(self, name, x, base, **options):
                    return base.forward(x) if name == "first" else branch.layer(name, x, base, **options)

            return super().__call__(batch, Some())

    found = layerwise.merge(JoinedSet(pair, dtype=torch.float64), Forgetful(), toy_references(), 0, ridge=shares.RIDGE)
    known = shares.merge(pair)
    for concept in CONCEPTS:
        for name in BOTH:
            same = torch.equal(found[concept][name], known[concept][name])
            assert same == (name == "first"), name


def test_both_references_apart_or_together_is_the_same_merge():
    joined = JoinedSet(toy_pair(), dtype=torch.float64)
    merges = [layerwise.merge(joined, ToyPredictor(joins), toy_references(), 3) for joins in (True, False)]
    for side in CONCEPTS:
        for name, m in merges[0][side].items():
            torch.testing.assert_close(m, merges[1][side][name])


def test_a_layer_that_a_pass_calls_twice_counts_twice():
    joined, activity = JoinedSet(toy_pair(), dtype=torch.float64), layerwise.Activity()
    branch = layerwise.RecordingBranch(joined, torch.tensor([0, 1]), activity)
    base = Dense(ToyPredictor().weights["first"])
    first, second = torch.rand(2, 2, 6, 5, dtype=torch.float64).unbind(0)
    for x in (first, second):
        branch.layer("first", x, base)
    for i, concept in enumerate(CONCEPTS):
        expected = torch.cat([first[i], second[i]]).square().mean(0)
        torch.testing.assert_close(activity.of("first", [concept])[:, 0].double(), expected, rtol=1e-5, atol=0)


def test_merge_keeps_both_better_than_the_direct_merge():
    joined, predictor, references = JoinedSet(toy_pair(), dtype=torch.float64), ToyPredictor(), toy_references()
    found = layerwise.merge(joined, predictor, references, seed=0, ridge=0.1)
    before, after = measure_retention(joined, predictor, references, [Coefficients.ones(joined.loras), found], seed=0)
    assert after["content"] + after["style"] < 0.8 * (before["content"] + before["style"])


def test_numbers_that_overflow_are_refused_by_the_name_of_their_layer():
    pair = toy_pair()
    pair.layers["second"]["content"].up[:] = float("inf")
    with pytest.raises(FloatingPointError, match="second.*not finite"):
        layerwise.merge(JoinedSet(pair, dtype=torch.float64), ToyPredictor(), toy_references(), seed=0)


def test_what_its_listener_raises_ends_it_after_one_layer():
    told = []

    def stop(layer):
        told.append(layer)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        layerwise.merge(JoinedSet(toy_pair(), dtype=torch.float64), ToyPredictor(), toy_references(), 0, stop)
    assert len(told) == 1
