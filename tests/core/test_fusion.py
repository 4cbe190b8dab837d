"""Mix-of-Show's fusion against dense least squares in float64, on layers small enough to write out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_routing import branch_of, flat, updates
from toys import NAMES, SHAPES, Dense, ToyPredictor, Watched, factors, references_of, toy_set

from ziplora_core import fusion, layerwise, routing, saved, zipper
from ziplora_core.branch import JoinedSet
from ziplora_core.coefficients import Coefficients
from ziplora_core.files import LoRAFileError
from ziplora_core.lora_set import LoRASet
from ziplora_core.merge import one_lora
from ziplora_core.solver import Settings


def fused(loras, ridge=fusion.RIDGE, predictor=None):
    """(what its layers saw, the new downs, what was told of each layer)"""
    predictor, told = predictor or Watched(), []
    joined = JoinedSet(loras, dtype=torch.float64)
    downs, _ = fusion.merge(joined, predictor, references_of(loras.concepts), 3, told.append, ridge)
    return predictor, downs, told


def least_squares(loras, predictor, name, ridge):
    """The dense minimum over ΔW, of smallest norm where there are several, and its error and the direct merge's."""
    layer = loras.layers[name]
    x = {c: predictor.inputs(name, place) for place, c in enumerate(loras.concepts)}
    wanted = {c: flat(layer[c]) if c in layer else torch.zeros_like(flat(next(iter(layer.values())))) for c in x}
    count = next(iter(x.values())).shape[1]
    size = sum(of.square().sum(1).mean() for of in x.values()) / count
    left = [of / len(of) ** 0.5 for of in x.values()]
    right = [of @ wanted[c].T / len(of) ** 0.5 for c, of in x.items()]
    left.append((ridge * size).sqrt() * torch.eye(count).double())
    right.append(torch.zeros(count, right[0].shape[1]).double())
    solution = torch.linalg.lstsq(torch.cat(left), torch.cat(right), driver="gelsd", rcond=1e-9).solution.T
    direct = sum(flat(f) for f in layer.values())
    errors = [
        float(sum((of @ (delta - wanted[c]).T).square().sum(1).mean() for c, of in x.items()))
        for delta in (solution, direct)
    ]
    return solution, errors


@pytest.mark.parametrize("ridge", [0.1, 1e-11])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_layer_is_the_dense_least_squares_solution(count, ridge):
    """Convolutions too, and layers that some LoRAs leave alone; nearly without a ridge, that of smallest norm."""
    loras = toy_set(count)
    predictor, downs, told = fused(loras, ridge)
    assert list(downs) == list(SHAPES)
    drawn = updates(routing.routed(loras, downs))
    for name in downs:
        expected, (error, at_direct) = least_squares(loras, predictor, name, ridge)
        torch.testing.assert_close(drawn[name], expected, rtol=1e-3, atol=1e-4)
        (said,) = [one.relative_error for one in told if one.name == name]
        assert said == pytest.approx(error / at_direct if at_direct > 1e-12 else 1, rel=1e-3, abs=1e-6)
        if count > 1:
            direct = updates(loras)[name]
            assert (expected - direct).norm() > 0.05 * direct.norm(), "near the sum the comparison shows little"


def test_one_lora_comes_back_where_its_reference_shows_every_input():
    loras = toy_set(1)
    predictor, downs, _ = fused(loras, 1e-12)
    drawn, expected = updates(routing.routed(loras, downs)), updates(loras)
    for name in loras.layers:
        x = predictor.inputs(name, 0)
        torch.testing.assert_close(x @ drawn[name].T, x @ expected[name].T, rtol=1e-4, atol=1e-5)
        if int(torch.linalg.matrix_rank(x)) == x.shape[1]:
            torch.testing.assert_close(drawn[name], expected[name], rtol=1e-3, atol=1e-4)
    assert all(int(torch.linalg.matrix_rank(predictor.inputs(n, 0))) == SHAPES[n][1] for n in ("first", "only content"))


def test_inputs_that_can_be_told_apart_are_answered_by_their_own_lora_and_others_by_none():
    generator = torch.Generator().manual_seed(0)
    layer = {name: factors((7, 12), 2, seed) for seed, name in enumerate(NAMES[:3])}
    inputs = {
        c: torch.randn(40, 2, generator=generator).double() @ torch.randn(2, 12, generator=generator).double()
        for c in layer
    }
    seen = {c: x.T @ x / len(x) for c, x in inputs.items()}
    targets = torch.cat([f.down @ seen[c] for c, f in layer.items()])
    downs, error = fusion.downs_of(layer, sum(seen.values()), targets, 1e-9)
    drawn = updates(routing.routed(LoRASet(NAMES[:3], {"layer": layer}), {"layer": downs[..., None]}))["layer"]
    for concept, x in inputs.items():
        torch.testing.assert_close(x @ drawn.T, x @ flat(layer[concept]).T, rtol=1e-4, atol=1e-4)
    assert error < 1e-6
    unseen = torch.linalg.svd(torch.cat(list(inputs.values())))[2][6:]
    assert (unseen @ drawn.T).abs().max() < 1e-6


def test_where_nothing_is_seen_the_sum_stays():
    layer = {name: factors((7, 12), 2, seed) for seed, name in enumerate(NAMES[:2])}
    downs, error = fusion.downs_of(layer, torch.zeros(12, 12).double(), torch.zeros(4, 12).double())
    assert torch.equal(downs, torch.cat([f.down for f in layer.values()])) and error == 1


@pytest.mark.parametrize(
    ("shape", "kernel", "convolution"),
    [
        ((2, 3, 9), (3,), {"stride": (2,), "padding": (1,), "dilation": (1,)}),
        ((2, 3, 7, 8), (3, 2), {"stride": (1, 2), "padding": (2, 1), "dilation": (2, 1)}),
        ((2, 3, 5, 6), (1, 1), {}),
        ((1, 2, 4, 5, 6), (1, 3, 2), {"stride": (1, 1, 2), "padding": (0, 1, 1), "dilation": (1, 1, 1)}),
        ((2, 3, 7, 8), (3, 3), {"padding": 1}),
        ((2, 4, 6), (), {}),
    ],
)
def test_patches_are_what_a_layer_multiplies(shape, kernel, convolution):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    columns = shape[1] if kernel else shape[-1]
    weight = torch.randn(5, columns, *kernel, generator=torch.Generator().manual_seed(1)).double()
    rows = fusion.patches(x, weight.shape[2:], convolution)
    convolve = {0: torch.nn.functional.linear, 1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[len(kernel)]
    expected = convolve(x, weight, **convolution)
    expected = expected.movedim(1, -1) if kernel else expected
    torch.testing.assert_close(rows @ weight.flatten(1).T, expected.flatten(0, -2))


def test_permuting_loras_permutes_the_merge():
    loras = toy_set(3)
    order = tuple(reversed(loras.concepts))
    turned = LoRASet(order, {name: {c: layer[c] for c in order if c in layer} for name, layer in loras.layers.items()})
    first, second = (updates(routing.routed(one, fused(one)[1])) for one in (loras, turned))
    for name, expected in first.items():
        torch.testing.assert_close(second[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dials", [{}, {"style": 0.4, "other": 2.0}])
def test_branch_set_and_one_exported_lora_draw_alike(dials):
    loras = toy_set(3)
    downs = fused(loras)[1]
    plain, coefficients = routing.routed(loras, downs), Coefficients.ones(loras).scaled(**dials)
    joined = JoinedSet(plain, dtype=torch.float64)
    branches = branch_of(loras, downs, dials), joined.student(joined.flatten(coefficients))
    weights = ToyPredictor().weights
    for name, shape in SHAPES.items():
        x = torch.randn(2, shape[1], *([4, 4] if len(shape) > 2 else []), dtype=torch.float64)
        options = {"padding": 1} if x.ndim == 4 else {}
        mine, set_ = (branch.layer(name, x, Dense(weights[name]), **options) for branch in branches)
        torch.testing.assert_close(mine, set_)
        up, down = one_lora(plain.layers[name], coefficients.of_layer(name))
        whole = weights[name] + (up.double() @ down.double().flatten(1)).view(shape)
        torch.testing.assert_close(Dense(whole).forward(x), mine, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [2, 3])
def test_the_solver_is_this_merge_with_a_ridge_of_its_own(count):
    loras = toy_set(count)
    joined, predictor, references = JoinedSet(loras, dtype=torch.float64), ToyPredictor(), references_of(loras.concepts)
    result = zipper.solve(joined, predictor, references, Settings(solver="fusion", ridge=100.0, seed=3))
    downs = fused(loras)[1]
    assert result.routing.keys() == downs.keys() and all(torch.equal(result.routing[n], of) for n, of in downs.items())
    assert list(result.relative_error) == list(loras.layers) and not result.history
    assert all(0 <= left < 0.7 for left in result.relative_error.values())
    assert not zipper.solve(joined, predictor, references, Settings(solver="fusion", steps=0)).routing


@pytest.mark.parametrize("joins", [True, False])
def test_layers_that_do_not_fit_are_added_up_in_further_rounds(monkeypatch, joins):
    """One layer a round, whether or not references share a pass: the same merge as at once."""
    loras = toy_set(3)
    expected = fused(loras)[1]
    monkeypatch.setattr(fusion, "ROOM", 0)
    predictor = ToyPredictor(joins)
    found = fused(loras, predictor=predictor)[1]
    assert predictor.calls == len(SHAPES) * layerwise.DRAWS * (1 if joins else 3)
    assert found.keys() == expected.keys()
    for name, downs in expected.items():
        torch.testing.assert_close(found[name], downs, rtol=1e-4, atol=1e-6)


def test_layers_of_too_many_inputs_are_weighed_by_columns(monkeypatch):
    loras = toy_set(2)
    monkeypatch.setattr(fusion, "LARGEST", 20)
    joined, references = JoinedSet(loras, dtype=torch.float64), references_of(loras.concepts)
    told = []
    downs, coefficients = fusion.merge(joined, ToyPredictor(), references, 3, told.append)
    assert sorted(downs) == sorted(set(SHAPES) - {"conv"}) and sorted(t.name for t in told) == sorted(SHAPES)
    assert [t.index for t in told] == list(range(1, len(SHAPES) + 1))
    columns = layerwise.merge(joined, ToyPredictor(), references, 3)
    for concept in loras.concepts:
        for name, m in coefficients[concept].items():
            torch.testing.assert_close(m, columns[concept][name] if name == "conv" else torch.ones_like(m))


class Shared(ToyPredictor):
    """Its layers `first` and `second` see one tensor, which is changed in place before a third sees it."""

    def __init__(self):
        super().__init__()
        self.weights = {n: torch.randn(4, 6).double() for n in ("first", "second", "third")}
        self.seen = []

    def __call__(self, batch, branch):
        x = self.noisy(batch).flatten(1)[:, :6]
        y = [branch.layer(name, x, Dense(self.weights[name])) for name in ("first", "second")]
        self.seen.append((batch.concept_index, x.clone()))
        x.mul_(torch.arange(6) - 2.0)
        return torch.cat([*y, branch.layer("third", x, Dense(self.weights["third"]))], 1)


def test_layers_that_see_one_tensor_share_its_moment_unless_it_was_changed():
    layers = {n: {c: factors((4, 6), 2, 10 * i + j) for j, c in enumerate(NAMES[:2])} for i, n in enumerate("abc")}
    loras = LoRASet(NAMES[:2], dict(zip(("first", "second", "third"), layers.values(), strict=True)))
    predictor, opened = Shared(), []
    joined = JoinedSet(loras, dtype=torch.float64)

    class Spied(fusion.Moments):
        def pop(self, name, layer):
            opened.append(id(self.layers[name].inputs))
            return super().pop(name, layer)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fusion, "Moments", Spied)
        downs, _ = fusion.merge(joined, predictor, references_of(loras.concepts), 3, ridge=1e-3)
    assert opened[0] == opened[1] != opened[2]
    drawn = updates(routing.routed(loras, downs))
    for name in loras.layers:
        scale = torch.arange(6) - 2.0 if name == "third" else torch.ones(6)
        x = {c: torch.cat([x[i == place] for i, x in predictor.seen]) * scale for place, c in enumerate(NAMES[:2])}
        moments = {c: of.T @ of / len(of) for c, of in x.items()}
        whole = sum(moments.values())
        whole = whole + 1e-3 * whole.trace() / 6 * torch.eye(6).double()
        aimed = sum(flat(loras.layers[name][c]) @ m for c, m in moments.items())
        torch.testing.assert_close(drawn[name], aimed @ torch.linalg.inv(whole), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_that_half_precision_cannot_hold_are_added_up_in_float32(dtype):
    layer = {"content": factors((3, 4), 2, 0)}
    joined = JoinedSet(LoRASet(("content",), {"layer": layer}), dtype=dtype)
    moments, x = fusion.Moments({"layer"}, 10**6), torch.full((1, 300, 4), 3000.0, dtype=dtype)
    branch = fusion.FusingBranch(joined, torch.zeros(1, dtype=torch.int64), set(), moments, layerwise.Activity())
    branch.layer("layer", x, Dense(torch.zeros(3, 4, dtype=dtype)))
    inputs, targets = moments.pop("layer", layer)
    expected = (x[0, 0, 0].double() ** 2).expand(4, 4)
    torch.testing.assert_close(inputs, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(targets, layer["content"].down @ expected, rtol=1e-4, atol=1)


def test_numbers_that_overflow_are_refused_by_the_name_of_their_layer():
    loras = toy_set(2)
    loras.layers["second"]["style"].down[:] = float("inf")
    with pytest.raises(FloatingPointError, match="second.*not finite"):
        fused(loras)


def test_what_its_listener_raises_ends_it_after_one_layer():
    told = []

    def stop(layer):
        told.append(layer)
        raise KeyboardInterrupt

    loras = toy_set(2)
    with pytest.raises(KeyboardInterrupt):
        fusion.merge(JoinedSet(loras, dtype=torch.float64), ToyPredictor(), references_of(loras.concepts), 0, stop)
    assert len(told) == 1


def test_downs_are_saved_and_only_of_a_fused_merge(tmp_path):
    loras = toy_set(2)
    downs = fused(loras)[1]
    lora = saved.SavedLoRA("a.safetensors", "0" * 64, 1, 1.0)
    said = {"sources": dict.fromkeys(loras.concepts, lora), "dials": dict.fromkeys(loras.concepts, 1.0)}
    settings = {saved.ROUTED_LAYERS: len(downs)}
    about = saved.SavedZip(**said, method=saved.FUSED, settings=settings, versions={})
    path = saved.write(tmp_path / "zip.safetensors", Coefficients.ones(loras), about, routing=downs)
    coefficients, found, again = saved.read(path)
    assert again == about and about.format == "ziplora 4"
    assert found.keys() == downs.keys() and all(torch.equal(found[n], of) for n, of in downs.items())
    saved.check_fits("zip", coefficients, loras)
    for method in ("zipped", saved.ROUTED):
        path = saved.write(
            tmp_path / "other.safetensors", Coefficients.ones(loras), replace(about, method=method), routing=downs
        )
        with pytest.raises(LoRAFileError, match="no usable coefficients at 'routing"):
            saved.read(path)


def test_downs_of_another_shape_are_refused():
    loras = toy_set(2)
    right = fused(loras)[1]["first"]
    for wrong in (right[:-1], right[:, :-1], right.expand(-1, -1, 2), right[..., None]):
        with pytest.raises(ValueError, match=r"layer 'first': a matrix .* does not route"):
            routing.routed(loras, {"first": wrong})


@pytest.mark.parametrize("positions", [5, 40])
def test_a_linear_layer_from_its_inputs_is_the_dense_least_squares_solution(positions):
    """Of two LoRAs, and of a reference whose LoRA leaves the layer alone; with fewer positions than inputs, too."""
    generator = torch.Generator().manual_seed(positions)
    of = {name: factors((12, 9), rank, seed) for seed, (name, rank) in enumerate((("one", 2), ("two", 3)))}
    seen = {name: torch.randn(positions + i, 9, generator=generator) for i, name in enumerate(("one", "two", "none"))}
    downs, error = fusion.fuse_linear(of, seen)
    found = sum(of[name].scale * of[name].up.double() @ downs[name].double() for name in of)
    wanted = {name: flat(of[name]).double() if name in of else torch.zeros(12, 9).double() for name in seen}
    scaled = {name: x.double() / len(x) ** 0.5 for name, x in seen.items()}
    ridge = (fusion.RIDGE * sum(x.square().sum() for x in scaled.values()) / 9).sqrt() * torch.eye(9).double()
    left = torch.cat([*scaled.values(), ridge])
    right = torch.cat([*(x @ wanted[name].T for name, x in scaled.items()), torch.zeros(9, 12).double()])
    solution = torch.linalg.lstsq(left, right, driver="gelsd").solution.T
    torch.testing.assert_close(found, solution, rtol=1e-4, atol=1e-5)
    direct = sum(wanted.values())

    def missed(delta):
        return sum((x @ (delta - wanted[name]).T).square().sum() for name, x in scaled.items())

    assert error == pytest.approx(float(missed(solution) / missed(direct)), rel=1e-3)
