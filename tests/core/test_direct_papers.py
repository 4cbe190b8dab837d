"""TIES, DARE, KnOTS, TSV-Merge and the cut sum against their formulas, densely in float64, and against peft."""

from __future__ import annotations

import importlib.util
import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toys import factors, toy_pair, toy_set

from ziplora_core.direct import METHODS, dare, election, knots, prepared, svd, ties, tsv, whole
from ziplora_core.lora_set import Factors, LoRASet, joined_rank
from ziplora_core.merge import one_lora

SETS = [toy_pair(), toy_set(3)]
NEAR = {"rtol": 1e-4, "atol": 1e-6}  # float32


def dense(f: Factors) -> torch.Tensor:
    return f.scale * f.up.double() @ f.down.double().flatten(1)


def merged(loras: LoRASet) -> dict[str, torch.Tensor]:
    """Layer -> ΔW of the merge, as it goes on a model and into a file."""
    found = {}
    for name, layer in loras.layers.items():
        up, down = one_lora(layer)
        found[name] = up.double() @ down.double().flatten(1)
        parts = sum(dense(f) for f in layer.values())
        torch.testing.assert_close(found[name], parts, **NEAR)  # each LoRA's own part is what a dial turns
    return found


def written_ties(updates: dict[str, dict[str, torch.Tensor]], share: float, scale: float) -> dict[str, torch.Tensor]:
    """Algorithm 1, number by number. updates: LoRA -> layer -> matrix."""
    trimmed: dict[str, dict[str, torch.Tensor]] = {}
    for concept, layers in updates.items():
        numbers = sorted((abs(x) for m in layers.values() for x in m.flatten().tolist()), reverse=True)
        least = numbers[max(1, int(share * len(numbers))) - 1]
        trimmed[concept] = {name: torch.where(m.abs() >= least, m, 0.0) for name, m in layers.items()}
    result: dict[str, torch.Tensor] = {}
    for name in dict.fromkeys(name for layers in updates.values() for name in layers):
        mine = [layers[name] for layers in trimmed.values() if name in layers]
        result[name] = torch.zeros_like(mine[0])
        for place in itertools.product(*map(range, mine[0].shape)):
            values = [m[place].item() for m in mine]
            positive = sum(values) > 0
            agree = [v for v in values if v and (v > 0) == positive]
            result[name][place] = scale * sum(agree) / max(1, len(agree))
    return result


def by_lora(loras: LoRASet) -> dict[str, dict[str, torch.Tensor]]:
    return {c: {n: dense(layer[c]) for n, layer in loras.layers.items() if c in layer} for c in loras.concepts}


def of_peft():
    """peft's merging functions, without the package around them, which takes seconds to import."""
    found = importlib.util.find_spec("peft")
    assert found is not None and found.origin is not None
    path = Path(found.origin).parent / "utils" / "merge_utils.py"
    spec = importlib.util.spec_from_file_location("merge_utils_of_peft", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def one_layer(count: int) -> LoRASet:
    """A set whose whole task vectors are one layer, as peft has them."""
    loras = toy_set(count)
    return LoRASet(loras.concepts, {"only": {c: factors((7, 10), 2 + i, i) for i, c in enumerate(loras.concepts)}})


@pytest.mark.parametrize("loras", SETS)
@pytest.mark.parametrize(("share", "scale"), [(0.2, 1.0), (0.5, 0.7), (1.0, 1.0)])
def test_ties_is_its_algorithm(loras, share, scale):
    expected = written_ties(by_lora(loras), share, scale)
    for name, found in merged(ties.merge(loras, share, scale)).items():
        torch.testing.assert_close(found, expected[name], **NEAR)


@pytest.mark.parametrize("count", [2, 3])
def test_ties_of_one_layer_is_pefts(count):
    loras = one_layer(count)
    updates = [dense(f) for f in loras.layers["only"].values()]
    expected = of_peft().ties(updates, torch.ones(count), 0.2)
    torch.testing.assert_close(merged(ties.merge(loras))["only"], expected, **NEAR)


def test_the_trim_is_of_the_whole_vector_and_exact():
    g = torch.Generator().manual_seed(0)
    parts = [torch.randn(400, generator=g) * s for s in (1.0, 30.0, 1e-6, 0.0)]
    numbers = torch.cat(parts).abs().sort(descending=True).values
    for share in (0.001, 0.2, 0.3, 0.6, 1.0):
        assert election.least_kept(lambda: parts, share) == numbers[max(1, int(share * 1600)) - 1].item()
    assert election.least_kept(lambda: parts, 0.0) == numbers[0].item()
    with pytest.raises(ValueError, match="changes no layer"):
        election.least_kept(lambda: [])
    faint = toy_pair()
    layer = {c: replace(f, scale=1e-6) for c, f in faint.layers["first"].items()}
    found = ties.merge(LoRASet(faint.concepts, {**faint.layers, "first": layer})).layers
    assert not any(f.down.any() for f in found["first"].values()) and found["conv"]["style"].down.any()


@pytest.mark.parametrize("loras", SETS)
@pytest.mark.parametrize(("drop", "seed"), [(0.5, 0), (0.9, 3), (0.0, 1)])
def test_dare_drops_and_enlarges(loras, drop, seed):
    found = dare.merge(loras, drop, seed)
    for name, layer in loras.layers.items():
        for concept, f in layer.items():
            part = found.layers[name][concept].down.flatten(1).double()
            expected = torch.where(part != 0, dense(f) / (1 - drop), 0.0)
            torch.testing.assert_close(part, expected, **NEAR)
            assert drop or (part != 0).all()
    merged(found)


def test_dares_masks_are_seeded_by_lora_and_layer_alone():
    shape = torch.Size((100, 100))
    masks = {key: dare.kept(shape, *key) for key in itertools.product(("a", "b"), ("content", "style"), (0.5,), (0, 1))}
    for one, other in itertools.combinations(masks.values(), 2):
        assert (one == other).float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert all(m.float().mean().item() == pytest.approx(0.5, abs=0.03) for m in masks.values())
    assert dare.kept(shape, "a", "content", 0.9, 0).float().mean().item() == pytest.approx(0.1, abs=0.02)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    whole_set, fewer = toy_set(3), toy_set(3)
    fewer = LoRASet(fewer.concepts, dict(reversed(list(fewer.layers.items()))))
    first, second = dare.merge(whole_set), dare.merge(fewer)
    for name, layer in first.layers.items():
        for concept, f in layer.items():
            assert torch.equal(f.down, second.layers[name][concept].down), (name, concept)
    assert torch.equal(torch.random.get_rng_state(), state), "the numbers of everyone were drawn from"


@pytest.mark.parametrize("count", [2, 3])
def test_dare_with_the_same_masks_is_pefts(count, monkeypatch):
    loras, peft = one_layer(count), of_peft()
    found = dare.merge(loras, 0.3)
    drawn = iter([(f.down != 0).double() for f in found.layers["only"].values()])
    monkeypatch.setattr(peft.torch, "bernoulli", lambda rates: next(drawn))
    expected = peft.dare_linear([dense(f) for f in loras.layers["only"].values()], torch.ones(count), 0.7)
    torch.testing.assert_close(merged(found)["only"], expected, **NEAR)


@pytest.mark.parametrize("loras", SETS)
@pytest.mark.parametrize(("share", "scale"), [(0.2, 1.0), (0.5, 0.7), (1.0, 1.0)])
def test_knots_is_ties_in_the_space_of_a_dense_svd(loras, share, scale):
    lefts, parts = {}, {c: {} for c in loras.concepts}
    for name, layer in loras.layers.items():
        joined = torch.cat([dense(f) for f in layer.values()], dim=1)
        left, values, right = torch.linalg.svd(joined, full_matrices=False)
        kept = values > values.max() * 1e-9
        lefts[name] = left[:, kept]
        split = (values[kept, None] * right[kept]).split(joined.shape[1] // len(layer), dim=1)
        for concept, part in zip(layer, split, strict=True):
            parts[concept][name] = part
    expected = written_ties({c: of for c, of in parts.items() if of}, share, scale)
    result = knots.merge(loras, share, scale)
    for name, found in merged(result).items():
        torch.testing.assert_close(found, lefts[name] @ expected[name], rtol=1e-4, atol=1e-5)
        assert joined_rank(result.layers[name]) <= sum(f.rank for f in loras.layers[name].values())
        assert joined_rank(result.layers[name]) == lefts[name].shape[1]


def test_knots_of_a_layer_that_is_zero():
    pair = toy_pair()
    zero = {c: replace(f, up=torch.zeros_like(f.up)) for c, f in pair.layers["first"].items()}
    found = merged(knots.merge(LoRASet(pair.concepts, {**pair.layers, "first": zero})))
    assert not found["first"].any() and found["conv"].any()


def test_knots_of_one_lora_twice_is_that_lora():
    f = factors((7, 10), 3, 1)
    twice = {"content": f, "style": Factors(f.up.clone(), f.down.clone(), f.scale)}
    found = knots.merge(LoRASet(tuple(twice), {"only": twice}), share=1.0)
    assert joined_rank(found.layers["only"]) == 3, "directions that neither has are kept"
    torch.testing.assert_close(merged(found)["only"], dense(f), **NEAR)


@pytest.mark.parametrize("loras", SETS)
def test_tsv_merge_is_its_formula_on_dense_matrices(loras):
    """The nearest orthonormal matrix is written otherwise here: X (XᵀX)^-½, by eigenvectors."""

    def nearest(x: torch.Tensor) -> torch.Tensor:
        sizes, vectors = torch.linalg.eigh(x.T @ x)
        return x @ (vectors * sizes.rsqrt()) @ vectors.T

    result = tsv.merge(loras)
    for name, found in merged(result).items():
        layer, lefts, sizes, rights = loras.layers[name], [], [], []
        if len(layer) < 2:
            assert result.layers[name] is layer
            continue
        for f in layer.values():
            left, values, right = torch.linalg.svd(dense(f), full_matrices=False)
            half = math.ceil(f.rank / len(layer))
            lefts.append(left[:, :half]), sizes.append(values[:half]), rights.append(right[:half].T)
        expected = nearest(torch.cat(lefts, 1)) @ torch.cat(sizes).diag() @ nearest(torch.cat(rights, 1)).T
        torch.testing.assert_close(found, expected, **NEAR)
        assert joined_rank(result.layers[name]) == sum(math.ceil(f.rank / len(layer)) for f in layer.values())


def test_tsv_merge_leaves_alone_what_is_orthogonal():
    left, right = (torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(s))).Q for s in (1, 2))
    sizes = torch.tensor([5.0, 2.0])
    layer = {c: Factors(left[:, i : i + 2] * sizes, right[i : i + 2]) for c, i in (("a", 0), ("b", 2))}
    found = merged(tsv.merge(LoRASet(("a", "b"), {"only": layer})))["only"]
    largest = sum(torch.outer(f.up[:, 0], f.down[0]) for f in layer.values())
    torch.testing.assert_close(found, largest.double(), **NEAR)


def test_tsv_merge_of_one_lora_twice_is_its_upper_half():
    f = factors((7, 10), 4, 1)
    twice = {"content": f, "style": Factors(f.up.clone(), f.down.clone(), f.scale)}
    found = merged(tsv.merge(LoRASet(tuple(twice), {"only": twice})))["only"]
    left, values, right = torch.linalg.svd(dense(f), full_matrices=False)
    torch.testing.assert_close(found, (left[:, :2] * values[:2]) @ right[:2], **NEAR)


@pytest.mark.parametrize("zeros", [("style",), ("content", "style")])
def test_tsv_merge_of_updates_that_are_zero(zeros):
    pair = toy_pair()
    layer = {c: replace(f, up=torch.zeros_like(f.up)) if c in zeros else f for c, f in pair.layers["first"].items()}
    found = tsv.merge(LoRASet(pair.concepts, {**pair.layers, "first": layer}))
    left, values, right = torch.linalg.svd(dense(layer["content"]), full_matrices=False)
    half = math.ceil(layer["content"].rank / 2)
    expected = (left[:, :half] * values[:half]) @ right[:half]
    torch.testing.assert_close(merged(found)["first"], expected, **NEAR)
    assert not dense(found.layers["first"]["style"]).any()


@pytest.mark.parametrize("loras", SETS)
def test_the_cut_sum_is_a_dense_svds(loras):
    result = svd.merge(loras)
    lost = total = 0.0
    for name, found in merged(result).items():
        layer = loras.layers[name]
        rank = max(f.rank for f in layer.values())
        whole_sum = sum(dense(f) for f in layer.values())
        left, values, right = torch.linalg.svd(whole_sum, full_matrices=False)
        expected = (left[:, :rank] * values[:rank]) @ right[:rank]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        assert joined_rank(result.layers[name]) == rank
        lost, total = lost + values[rank:].square().sum().item(), total + values.square().sum().item()
    assert 0 < lost < total
    assert svd.told(loras, result) == [f"the cut keeps {1 - lost / total:.1%} of the energy of the sum"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_whole_updates_are_as_precise_as_the_files(dtype):
    loras = toy_set(3)
    stored = {
        n: {c: Factors(f.up.to(dtype), f.down.to(dtype), f.scale) for c, f in layer.items()}
        for n, layer in loras.layers.items()
    }
    loras = replace(loras, layers=stored)
    result = dare.merge(loras, 0.0)
    held = {}
    for name, layer in result.layers.items():
        for concept, f in layer.items():
            assert torch.equal(f.down.flatten(1), whole.update(stored[name][concept]).to(dtype)), name
            held |= {id(m): m.nbytes for m in (f.up, f.down)}
    assert whole.size(loras) == sum(held.values())
    assert f"{sum(held.values()) / 1e6:,.0f} MB" in whole.told(loras, result)[0]


def test_whole_updates_of_mixed_files_and_too_large_ones_are_float32():
    layer = {c: Factors(f.up.half(), f.down.half(), f.scale) for c, f in toy_pair().layers["first"].items()}
    mixed = {**layer, "style": replace(layer["style"], down=layer["style"].down.bfloat16())}
    large = {c: replace(f, scale=1e6) for c, f in layer.items()}
    for changed in (mixed, large):
        found = dare.merge(LoRASet(tuple(layer), {"first": changed}), 0.0).layers["first"]
        assert all(f.down.dtype == torch.float32 and f.down.isfinite().all() for f in found.values())
        assert joined_rank(found) == 7


@pytest.mark.parametrize("method", ["TIES", "DARE", "KnOTS", "TSV-Merge", "SVD"])
def test_a_merge_is_made_again_from_what_its_file_says(method):
    loras = toy_set(3)
    merge = METHODS[method]
    result, ones = merge(loras)
    again = prepared(loras, method, merge.settings)
    for name, layer in result.layers.items():
        for concept, f in layer.items():
            assert torch.equal(f.down, again.layers[name][concept].down)
            assert torch.equal(f.up, again.layers[name][concept].up)
    assert ones.overlap() == 1.0


@pytest.mark.parametrize(
    ("method", "settings", "expected"),
    [
        ("TIES", {"share": 0.5, "scale": 0.7}, lambda s: ties.merge(s, 0.5, 0.7)),
        ("DARE", {"drop": 0.3, "seed": 7}, lambda s: dare.merge(s, 0.3, 7)),
        ("KnOTS", {"share": 0.5, "scale": 0.7}, lambda s: knots.merge(s, 0.5, 0.7)),
    ],
)
def test_settings_of_a_file_are_used_or_refused(method, settings, expected):
    loras = toy_pair()
    again, wanted = merged(prepared(loras, method, settings)), merged(expected(loras))
    default = merged(prepared(loras, method, {}))
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)
    assert not all(torch.equal(again[name], default[name]) for name in wanted)
    for name in settings:
        for wrong in ("much", -1, None, float("nan"), True, 1e300):
            with pytest.raises(ValueError, match=f"{name} is .*expected a"):
                prepared(loras, method, {**settings, name: wrong})
