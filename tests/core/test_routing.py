"""Routing on the rank axis against dense least squares in float64, on layers small enough to write out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toys import NAMES, SHAPES, Dense, ToyPredictor, Watched, factors, references_of, toy_pair, toy_set

from ziplora_core import layerwise, routing, saved, zipper
from ziplora_core.branch import JoinedSet
from ziplora_core.coefficients import Coefficients
from ziplora_core.files import LoRAFileError
from ziplora_core.lora_set import LoRASet
from ziplora_core.merge import merged_factors
from ziplora_core.retention import measure_retention
from ziplora_core.solver import Settings

RIDGE = 0.2


def several(loras):
    return [name for name, layer in loras.layers.items() if len(layer) > 1]


def flat(f):
    """ΔW (out, in · kernel)."""
    wide = torch.float64 if f.down.dtype == torch.float64 else torch.float32
    return f.scale * f.up.to(wide) @ f.down.to(wide).flatten(1)


def updates(loras):
    """Layer -> the merge's ΔW."""
    return {n: sum(flat(f) for f in layer.values()) for n, layer in loras.layers.items()}


def merged(loras, ridge=RIDGE):
    """(what its layers saw, the merge, what was told of each layer)"""
    predictor, told = Watched(), []
    joined = JoinedSet(loras, dtype=torch.float64)
    matrices, _ = routing.merge(joined, predictor, references_of(loras.concepts), 3, told.append, ridge)
    return predictor, matrices, told


def branch_of(loras, matrices, dials=None, coefficients=None):
    joined = JoinedSet(loras, dtype=torch.float64)
    coefficients = (coefficients or Coefficients.ones(loras)).scaled(**(dials or {}))
    return routing.RoutedBranch(joined.student(joined.flatten(coefficients)), matrices)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_each_layer_is_the_dense_least_squares_solution(count):
    loras = toy_set(count)
    predictor, matrices, told = merged(loras)
    assert sorted(matrices) == sorted(several(loras))
    drawn = updates(routing.routed(loras, matrices))
    for name in matrices:
        layer = loras.layers[name]
        x = {c: predictor.inputs(name, loras.concepts.index(c)) for c in layer}
        rows = torch.cat([f.down.flatten(1) for f in layer.values()])
        owner = torch.tensor([i for i, f in enumerate(layer.values()) for _ in range(f.rank)])
        weights = torch.stack(
            [sum((x[k] @ flat(f).T).square().sum(1).mean() for k in layer if k != c) for c, f in layer.items()]
        )
        weights /= weights.sum()
        z = {c: x[c] @ rows.T for c in layer}
        size = sum(w * z[c].square().sum(1).mean() for w, c in zip(weights, layer, strict=True))
        pull = (RIDGE / len(layer) * size / rows.square().sum()).sqrt()
        left, right = [pull * rows.T], [pull * rows.T]
        for i, c in enumerate(layer):
            scale = (weights[i] / len(z[c])).sqrt()
            left.append(scale * z[c])
            right.append(scale * z[c] * (owner == i))
        solution = torch.linalg.lstsq(torch.cat(left), torch.cat(right), driver="gelsd").solution.T
        up, down = merged_factors(layer)
        expected = up @ solution @ down.flatten(1)
        torch.testing.assert_close(drawn[name], expected, rtol=2e-4, atol=2e-5)
        direct = up @ down.flatten(1)
        assert (drawn[name] - direct).norm() > 0.05 * direct.norm(), "near the sum the comparison shows little"
        errors = [
            sum(
                w * (x[c] @ (delta - flat(layer[c])).T).square().sum(1).mean()
                for w, c in zip(weights, layer, strict=True)
            )
            for delta in (expected, direct)
        ]
        (error,) = [one.relative_error for one in told if one.name == name]
        assert error == pytest.approx(float(errors[0] / errors[1]), rel=1e-3)


def test_a_large_ridge_gives_the_sum():
    loras = toy_set(3)
    drawn = updates(routing.routed(loras, merged(loras, 1e6)[1]))
    for name, expected in updates(loras).items():
        torch.testing.assert_close(drawn[name], expected, rtol=1e-4, atol=1e-5)


def test_without_a_ridge_each_lora_alone_answers_inputs_that_can_be_told_apart():
    """Three LoRAs that would all answer every input; each reference lies in directions of its own."""
    generator = torch.Generator().manual_seed(0)
    layer = {name: factors((7, 12), 2, seed) for seed, name in enumerate(NAMES[:3])}
    inputs = {
        c: torch.randn(40, 2, generator=generator).double() @ torch.randn(2, 12, generator=generator).double()
        for c in layer
    }
    rows = torch.cat([f.down for f in layer.values()])
    seen = {c: (x @ rows.T).T @ (x @ rows.T) / len(x) for c, x in inputs.items()}
    matrix, error = routing.matrix_of(layer, seen, ridge=1e-12)
    drawn = updates(routing.routed(LoRASet(NAMES[:3], {"layer": layer}), {"layer": matrix}))["layer"]
    for concept, x in inputs.items():
        torch.testing.assert_close(x @ drawn.T, x @ flat(layer[concept]).T, rtol=1e-5, atol=1e-5)
    assert error < 1e-6


def test_permuting_loras_permutes_the_merge():
    loras = toy_set(3)
    order = tuple(reversed(loras.concepts))
    turned = LoRASet(order, {name: {c: layer[c] for c in order if c in layer} for name, layer in loras.layers.items()})
    first, second = (updates(routing.routed(one, merged(one)[1])) for one in (loras, turned))
    for name, expected in first.items():
        torch.testing.assert_close(second[name], expected, rtol=1e-4, atol=1e-5)


def test_one_that_adds_nothing_leaves_the_others_as_they_are_without_it():
    loras = toy_set(3)
    silent = {
        n: {c: replace(f, up=0 * f.up) if c == "other" else f for c, f in layer.items()}
        for n, layer in loras.layers.items()
    }
    with_it = updates(routing.routed(s := LoRASet(loras.concepts, silent), merged(s, 1e-6)[1]))
    alone = {n: {c: f for c, f in layer.items() if c != "other"} for n, layer in silent.items()}
    pair = LoRASet(loras.concepts[:2], {n: layer for n, layer in alone.items() if layer})
    without = updates(routing.routed(pair, merged(pair, 1e-6)[1]))
    name = "first"  # whose inputs the reference of the silent one does not change
    seen = merged(s)[0]
    x = torch.cat([seen.inputs(name, place) for place in (0, 1)])
    torch.testing.assert_close(x @ with_it[name].T, x @ without[name].T, rtol=0.05, atol=0.02)


def test_the_branch_draws_as_the_routed_set_does():
    loras = toy_set(3)
    matrices = merged(loras)[1]
    plain = JoinedSet(routing.routed(loras, matrices), dtype=torch.float64)
    ones = plain.student(plain.flatten(Coefficients.ones(plain.loras)))
    mine = branch_of(loras, matrices)
    weights = ToyPredictor().weights
    for name, shape in SHAPES.items():
        x = torch.randn(2, shape[1], *([4, 4] if len(shape) > 2 else []), dtype=torch.float64)
        options = {"padding": 1} if x.ndim == 4 else {}
        drawn = [branch.layer(name, x, Dense(weights[name]), **options) for branch in (mine, ones)]
        torch.testing.assert_close(*drawn)


@pytest.mark.parametrize("count", [3, 5])
def test_the_solver_routes_three_and_more_and_keeps_them_better_than_the_sum(count):
    loras = toy_set(count)
    joined, predictor, references = JoinedSet(loras, dtype=torch.float64), ToyPredictor(), references_of(loras.concepts)
    result = zipper.solve(joined, predictor, references, Settings(solver="layerwise"))
    assert result.routing and list(result.relative_error) == list(loras.layers)
    candidates = [Coefficients.ones(loras), branch_of(loras, result.routing, coefficients=result.coefficients)]
    before, after = (sum(by.values()) for by in measure_retention(joined, predictor, references, candidates, 0))
    assert after < 0.97 * before


def test_two_are_solved_by_columns():
    joined = JoinedSet(toy_pair(), dtype=torch.float64)
    result = zipper.solve(joined, ToyPredictor(), references_of(joined.concepts), Settings(solver="layerwise"))
    assert not result.routing
    assert max(float((m - 1).abs().max()) for m in result.coefficients["content"].values()) > 0.01


def test_it_takes_eight_passes_and_both_ways_of_batching_are_one_merge():
    loras = toy_set(3)
    joined, references = JoinedSet(loras, dtype=torch.float64), references_of(loras.concepts)
    together, apart = ToyPredictor(True), ToyPredictor(False)
    first, second = (routing.merge(joined, p, references, 3)[0] for p in (together, apart))
    assert (together.calls, apart.calls) == (8, 24)
    one, two = (updates(routing.routed(loras, matrices)) for matrices in (first, second))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_that_half_precision_cannot_hold_are_added_up_in_float32(dtype):
    seen, z = routing.Seen(), torch.full((2, 300, 4), 3000.0, dtype=dtype)
    seen.add("layer", "content", z)
    value = z[0, 0, 0].double()
    layer = {"content": factors((3, 5), 4, 0)}
    torch.testing.assert_close(seen.pop("layer", layer)["content"], (value**2).expand(4, 4), rtol=1e-5, atol=0)
    assert seen.pop("layer", layer) is None and not seen.sums


@pytest.mark.parametrize("limit", ["LARGEST", "ROOM"])
def test_layers_of_too_many_ranks_are_weighed_by_columns(monkeypatch, limit):
    """As the layer-wise solve weighs them, and both together draw better than the sum."""
    loras = toy_set(5)
    ranks = {n: sum(f.rank for f in loras.layers[n].values()) for n in several(loras)}
    small = [n for n, rank in ranks.items() if rank <= 8]
    bytes_of_small = sum(4 * len(loras.layers[n]) * ranks[n] ** 2 for n in small)
    monkeypatch.setattr(routing, limit, 8 if limit == "LARGEST" else bytes_of_small)
    joined, references = JoinedSet(loras, dtype=torch.float64), references_of(loras.concepts)
    matrices, coefficients = routing.merge(joined, ToyPredictor(), references, 3)
    assert sorted(matrices) == sorted(small) and 0 < len(small) < len(ranks)
    columns = layerwise.merge(joined, ToyPredictor(), references, 3)
    for concept in loras.concepts:
        for name, m in coefficients[concept].items():
            expected = torch.ones_like(m) if name in matrices else columns[concept][name]
            torch.testing.assert_close(m, expected)
    candidates = [Coefficients.ones(loras), branch_of(loras, matrices, coefficients=coefficients)]
    before, after = (sum(b.values()) for b in measure_retention(joined, ToyPredictor(), references, candidates, 0))
    assert after < before


def test_a_lora_that_changes_nothing_makes_no_third():
    loras = toy_set(3)
    off = {
        n: {c: replace(f, scale=0.0) if c == "other" else f for c, f in layer.items()}
        for n, layer in loras.layers.items()
    }
    joined = JoinedSet(LoRASet(loras.concepts, off), dtype=torch.float64)
    assert not zipper.solve(joined, ToyPredictor(), references_of(loras.concepts), Settings(solver="layerwise")).routing


def test_where_nothing_is_seen_the_sum_stays():
    layer = {name: factors((7, 12), 2, seed) for seed, name in enumerate(NAMES[:3])}
    matrix, error = routing.matrix_of(layer, dict.fromkeys(layer, torch.zeros(6, 6, dtype=torch.float64)))
    assert torch.equal(matrix, torch.eye(6).double()) and error == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_files_in_few_bits_are_routed(dtype):
    loras = toy_set(3)
    matrices = merged(loras)[1]
    coarse = {
        n: {c: replace(f, up=f.up.to(dtype), down=f.down.to(dtype)) for c, f in layer.items()}
        for n, layer in loras.layers.items()
    }
    drawn = updates(routing.routed(s := LoRASet(loras.concepts, coarse), matrices))
    up, down = merged_factors(s.layers["first"])
    torch.testing.assert_close(drawn["first"].float(), up @ matrices["first"] @ down, rtol=1e-4, atol=1e-5)


def test_numbers_that_overflow_are_refused_by_the_name_of_their_layer():
    loras = toy_set(3)
    loras.layers["second"]["style"].down[:] = float("inf")
    with pytest.raises(FloatingPointError, match="second.*not finite"):
        merged(loras)


def test_what_its_listener_raises_ends_it_after_one_layer():
    told = []

    def stop(layer):
        told.append(layer)
        raise KeyboardInterrupt

    loras = toy_set(3)
    with pytest.raises(KeyboardInterrupt):
        routing.merge(JoinedSet(loras, dtype=torch.float64), ToyPredictor(), references_of(loras.concepts), 0, stop)
    assert len(told) == 1


def test_matrices_are_saved_and_only_of_a_routed_merge(tmp_path):
    loras = toy_set(3)
    matrices = merged(loras)[1]
    lora = saved.SavedLoRA("a.safetensors", "0" * 64, 1, 1.0)
    said = {"sources": dict.fromkeys(loras.concepts, lora), "dials": dict.fromkeys(loras.concepts, 1.0)}
    settings = {saved.ROUTED_LAYERS: len(matrices)}
    about = saved.SavedZip(**said, method=saved.ROUTED, settings=settings, versions={})
    path = saved.write(tmp_path / "zip.safetensors", Coefficients.ones(loras), about, routing=matrices)
    coefficients, found, again = saved.read(path)
    assert again == about and about.format == "ziplora 3"
    assert found.keys() == matrices.keys() and all(torch.equal(found[n], m) for n, m in matrices.items())
    saved.check_fits("zip", coefficients, loras)
    short = dict(list(matrices.items())[1:])
    with pytest.raises(LoRAFileError, match="'short.safetensors' lacks matrices; zip"):
        saved.read(saved.write(tmp_path / "short.safetensors", coefficients, about, routing=short))
    plain = replace(about, method="zipped")
    path = saved.write(tmp_path / "plain.safetensors", Coefficients.ones(loras), plain, routing=matrices)
    with pytest.raises(LoRAFileError, match="no usable coefficients at 'routing"):
        saved.read(path)


def test_matrices_of_other_ranks_are_refused():
    loras = toy_set(3)
    with pytest.raises(ValueError, match="layer 'first': a matrix .2, 2. does not route 6 ranks"):
        routing.routed(loras, {"first": torch.eye(2)})
    with pytest.raises(ValueError, match="layer 'of another model'"):
        routing.routed(loras, {"of another model": torch.eye(2)})


@pytest.mark.parametrize("dials", [{}, {"style": 0.4}, {"content": 0.0, "other": 2.0}])
def test_the_branch_turns_loras_up_and_down_by_name(dials):
    loras = toy_set(3)
    matrices = merged(loras)[1]
    plain = JoinedSet(routing.routed(loras, matrices), dtype=torch.float64)
    turned = plain.student(plain.flatten(Coefficients.ones(plain.loras).scaled(**dials)))
    mine = branch_of(loras, matrices, dials)
    for name in ("conv", "second"):
        shape = SHAPES[name]
        x = torch.randn(2, shape[1], *([4, 4] if len(shape) > 2 else []), dtype=torch.float64)
        options = {"padding": 1} if x.ndim == 4 else {}
        drawn = [branch.layer(name, x, Dense(ToyPredictor().weights[name]), **options) for branch in (mine, turned)]
        torch.testing.assert_close(*drawn)


def test_each_layer_is_told_of_by_its_number():
    loras = toy_set(3)
    told = merged(loras)[2]
    assert [(s.name, s.index, s.layers) for s in told] == [(n, i, len(SHAPES)) for i, n in enumerate(SHAPES, 1)]
    assert all(s.relative_error == 1 for s in told if len(loras.layers[s.name]) == 1)


def test_the_seed_is_the_passes_own():
    loras = toy_set(3)
    joined, references = JoinedSet(loras, dtype=torch.float64), references_of(loras.concepts)
    one, same, other = (routing.merge(joined, ToyPredictor(), references, seed)[0]["first"] for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
