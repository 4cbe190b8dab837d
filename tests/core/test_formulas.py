"""Objectives, coefficients and pairs against their formulas, written out number by number."""

from __future__ import annotations

import pytest
import torch
from toys import factors, of_two, toy_pair

from benchmarks.objectives import mean_square, summed_mean_products
from ziplora_core import scores
from ziplora_core.coefficients import Coefficients, owners
from ziplora_core.lora_set import CONCEPTS, Factors, LoRASet
from ziplora_core.merge import merged_factors
from ziplora_core.objective import (
    BALANCED,
    OBJECTIVES,
    PAPER,
    norm,
    overlap_percent,
    summed_dot_products,
)

OWNERS = owners(CONCEPTS)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_coefficients(pair, seed=0):
    ones = Coefficients.ones(pair)
    return Coefficients(
        {
            c: {n: numbers(len(m), seed=seed + 10 * i + j).float() for j, (n, m) in enumerate(side.items())}
            for i, (c, side) in enumerate(ones.by_concept.items())
        }
    )


def test_retentions():
    student, teacher = numbers(3, 2, 4), numbers(3, 2, 4, seed=1)
    squares = [
        sum(float(student[i, j, k] - teacher[i, j, k]) ** 2 for j in range(2) for k in range(4)) for i in range(3)
    ]
    assert norm(student, teacher).item() == pytest.approx(sum(s**0.5 for s in squares) / 3)
    assert mean_square(student, teacher).item() == pytest.approx(sum(squares) / 24)


def test_overlaps():
    """Where signs cancel within a layer, and between layers."""
    sizes = [3, 2, 4]
    content = torch.tensor([1, -2, 3, 0.5, 1.5, -1, 2, 0.25, -3], dtype=torch.float64)
    style = torch.tensor([2, 1.5, 0.5, -1, -0.5, 1, 1, -2, 0.1], dtype=torch.float64)
    layers = [
        [float(a * b) for a, b in list(zip(content, style, strict=True))[i:j]] for i, j in ((0, 3), (3, 5), (5, 9))
    ]
    dots = sum(abs(sum(layer)) for layer in layers)
    means = sum(sum(map(abs, layer)) / len(layer) for layer in layers)
    percent = 100 * sum(abs(p) for layer in layers for p in layer) / 9
    for overlap, expected in ((summed_dot_products, dots), (summed_mean_products, means), (overlap_percent, percent)):
        assert overlap(content, style, sizes).item() == pytest.approx(expected), overlap.__name__


def test_the_two_readings_of_the_objective():
    assert OBJECTIVES == {"balanced": BALANCED, "paper": PAPER}
    assert (BALANCED.retention, BALANCED.overlap, BALANCED.relative) == (norm, overlap_percent, True)
    assert (PAPER.retention, PAPER.overlap, PAPER.relative) == (norm, summed_dot_products, False)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 1.0])
def test_overlap_and_owners_column_by_column(threshold):
    pair = toy_pair()
    m = random_coefficients(pair)
    m["content"]["first"][0] = threshold  # at the threshold is owned, with either sign
    m["style"]["conv"][1] = -threshold
    counts, layers, products = dict.fromkeys(OWNERS, 0), {}, []
    for name in ("conv", "first", "second"):
        here = dict.fromkeys(OWNERS, 0)
        for c, s in zip(m["content"][name].tolist(), m["style"][name].tolist(), strict=True):
            limit = torch.tensor(threshold).item()
            owner = {(True, False): "content", (False, True): "style", (True, True): "both", (False, False): "neither"}
            here[owner[abs(c) >= limit, abs(s) >= limit]] += 1
            products.append(abs(c * s))
        layers[name] = {o: n / len(m["content"][name]) for o, n in here.items()}
        counts = {o: counts[o] + here[o] for o in OWNERS}
    assert m.overlap() == pytest.approx(sum(products) / len(products))
    assert m.ownership(threshold) == pytest.approx({o: n / len(products) for o, n in counts.items()})
    found = m.ownership_by_layer(threshold)
    assert list(found) == list(layers)
    for name, shares in layers.items():
        assert found[name] == pytest.approx(shares)


def test_most_changed_counts_either_direction():
    pair = toy_pair()
    ones = Coefficients.ones(pair)
    changed = {"content": {}, "style": {}}
    for concept, side in ones.by_concept.items():
        changed[concept] = {n: m.clone() for n, m in side.items()}
    changed["content"]["first"][2] = -1.5
    changed["style"]["conv"][1] = 3.0
    concept, name, by = Coefficients(changed).most_changed(ones)
    assert (concept, name, by) == ("content", "first", 2.5)
    assert ones.most_changed(ones) == ("", "", 0.0)


def test_each_concept_is_scaled_by_its_own_weight():
    m = random_coefficients(toy_pair())
    scaled = m.scaled(content=0.5, style=3.0)
    assert all(torch.equal(scaled["content"][n], v * 0.5) for n, v in m["content"].items())
    assert all(torch.equal(scaled["style"][n], v * 3.0) for n, v in m["style"].items())


def test_ranks_are_the_smallest_and_the_largest_of_one_concept():
    layers = {
        str(r): of_two(factors((4, 3), r, r), factors((4, 3), s, s) if s else None) for r, s in ((2, 5), (4, 1), (3, 0))
    }
    pair = LoRASet(CONCEPTS, layers)
    assert pair.ranks("content") == (2, 4) and pair.ranks("style") == (1, 5)
    assert pair.layer_counts() == {"both": 2, "content only": 1, "style only": 0}


@pytest.mark.parametrize(
    ("up", "down"), [((2, 3, 1, 1), (3, 4, 1, 1)), ((2, 3), (4, 3)), ((2, 3), (3,)), ((3, 2), (3, 3))]
)
def test_factors_that_do_not_multiply_are_refused_with_their_shapes(up, down):
    with pytest.raises(ValueError, match="do not multiply") as caught:
        Factors(torch.ones(up), torch.ones(down))
    assert str(up) in str(caught.value) and str(down) in str(caught.value)


@pytest.mark.parametrize("scale", [-2.0, 0.25, 1.0])
def test_a_merge_has_each_scale_once(scale):
    layer = of_two(factors((4, 3), 2, 0, scale), factors((4, 3), 1, 1, -0.5))
    up, down = merged_factors(layer)
    dense = sum(f.scale * f.up @ f.down for _, f in layer.items())
    torch.testing.assert_close(up @ down, dense, rtol=1e-12, atol=1e-12)


def test_alignment_is_the_mean_cosine_with_all_references():
    features, references = numbers(3, 5), numbers(4, 5, seed=1)
    expected = [
        sum(float(torch.dot(f, r)) / float(f.square().sum().sqrt() * r.square().sum().sqrt()) for r in references) / 4
        for f in features
    ]
    found = scores.alignment(features.half(), references.half())
    assert found.dtype == torch.float32 and found.tolist() == pytest.approx(expected, abs=2e-3)
    with pytest.raises(ValueError, match="features of 5 and of 6 numbers"):
        scores.alignment(features, numbers(4, 6))


def test_summary_of_scores():
    found = scores.summary({"a": torch.tensor([0.1, 0.2, 0.61234]), "b": torch.tensor([0.5])})
    mean = (0.1 + 0.2 + 0.61234) / 3
    spread = (sum((x - mean) ** 2 for x in (0.1, 0.2, 0.61234)) / 2) ** 0.5
    assert found["a"] == {
        "mean": pytest.approx(mean, abs=5e-5),
        "spread": pytest.approx(spread, abs=5e-5),
        "pictures": [0.1, 0.2, 0.6123],
    }
    assert found["b"] == {"mean": 0.5, "spread": 0.0, "pictures": [0.5]}
