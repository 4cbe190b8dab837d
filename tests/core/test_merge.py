"""The identity: a zipped pair is a LoRA of rank r_c + r_s, against dense float64 algebra."""

from __future__ import annotations

import pytest
import torch
from toys import factors, merged_layers, of_two, toy_pair

from ziplora_core import export
from ziplora_core.coefficients import Coefficients
from ziplora_core.lora_set import CONCEPTS, Factors, LoRASet, joined_rank
from ziplora_core.merge import merged_factors, one_lora


def dense(f: Factors) -> torch.Tensor:
    return f.scale * torch.einsum("or,ri...->oi...", f.up.double(), f.down.double())


def test_hand_computed():
    content = Factors(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, 10.0]]))
    style = Factors(torch.tensor([[1.0], [0.0]]), torch.tensor([[5.0, 7.0]]), 2.0)
    up, down = merged_factors(of_two(content, style), of_two(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.5])))
    assert torch.equal(up @ down, torch.tensor([[1.0, 7.0], [2.0, 0.0]]))


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 1, 1), (6, 5, 3, 3), (6, 5, 3)])
def test_equals_dense(shape):
    content, style = factors(shape, 2, 1, 0.5), factors(shape, 4, 2, 1.5)
    m_c, m_s = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    up, down = merged_factors(of_two(content, style), of_two(m_c, m_s))
    columns = (1, 5, *[1] * (len(shape) - 2))
    expected = dense(content) * m_c.reshape(columns) + dense(style) * m_s.reshape(columns)
    assert up.shape[1] == down.shape[0] == 6
    torch.testing.assert_close(torch.einsum("or,ri...->oi...", up, down), expected, rtol=1e-12, atol=1e-12)


def test_ones_are_the_direct_merge_and_scaling_is_a_dial():
    pair = toy_pair()
    ones = Coefficients.ones(pair)
    for weights in ((1.0, 1.0), (0.0, 1.0), (1.0, 0.25)):
        scaled = ones.scaled(**of_two(*weights))
        for name, up, down in merged_layers(pair, scaled):
            parts = zip(("content", "style"), weights, strict=True)
            layer = pair.layers[name]
            expected = sum(w * dense(layer[c]) for c, w in parts if c in layer)
            merged = torch.einsum("or,ri...->oi...", up, down)
            torch.testing.assert_close(merged, expected, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(m, torch.ones_like(m)) for m in ones["content"].values()), "scaled() changed the original"


def test_counts():
    pair = toy_pair()
    by_hand = (3 + 3) + (5 + 5) + (7 + 7) + 4 + 4
    ones = sum(m.numel() for side in Coefficients.ones(pair).by_concept.values() for m in side.values())
    assert pair.coefficient_count == ones == by_hand
    assert pair.layer_counts() == {"both": 3, "content only": 1, "style only": 1}
    assert pair.ranks("content") == (2, 2) and pair.ranks("style") == (3, 3)
    assert LoRASet(CONCEPTS, {}).coefficient_count == 0 and LoRASet(CONCEPTS, {}).ranks("style") == (0, 0)


def test_half_precision_factors_merge_in_float32():
    half = Factors(torch.ones(2, 1, dtype=torch.float16), torch.full((1, 3), 1 / 3, dtype=torch.float16))
    up, down = merged_factors(of_two(half, half), of_two(torch.full((3,), 1 / 3), torch.ones(3)))
    assert up.dtype == down.dtype == torch.float32
    assert down[0, 0].item() == pytest.approx(half.down[0, 0].item() / 3, rel=1e-6)


@pytest.mark.parametrize(
    "build",
    [
        lambda: LoRASet(CONCEPTS, {"layer": of_two()}),
        lambda: Factors(torch.ones(2, 3), torch.ones(2, 4)),
        lambda: LoRASet(CONCEPTS, {"layer": of_two(factors((2, 3), 1, 0), factors((3, 3), 1, 0))}),
        lambda: merged_factors(of_two(factors((2, 3), 1, 0)), of_two(torch.ones(2))),
    ],
)
def test_refuses_what_does_not_fit(build):
    with pytest.raises(ValueError, match=r"\d|neither"):
        build()


def test_updates_on_one_up_stay_on_it():
    up = factors((6, 5, 3, 3), 4, 1).up
    layer = {c: Factors(up, factors((6, 5, 3, 3), 4, seed).down, 0.5 + seed) for seed, c in enumerate(CONCEPTS)}
    m = of_two(torch.randn(5), None)
    for chosen in (None, m):
        whole, joined = (torch.einsum("or,ri...->oi...", *of(layer, chosen)) for of in (merged_factors, one_lora))
        torch.testing.assert_close(joined, whole, rtol=1e-12, atol=1e-12)
        file = export.whole(layer, chosen or {}, torch.float32)
        torch.testing.assert_close(
            torch.einsum("or,ri...->oi...", file.up, file.down).double(), whole, rtol=1e-5, atol=1e-5
        )
        assert file.rank == joined_rank(layer) == 4
    apart = {c: Factors(f.up.clone(), f.down, f.scale) for c, f in layer.items()}
    assert joined_rank(apart) == one_lora(apart)[0].shape[1] == 8
    with pytest.raises(ValueError, match="content has 5 columns in this layer but 4 coefficients"):
        one_lora(layer, of_two(torch.ones(4), None))
