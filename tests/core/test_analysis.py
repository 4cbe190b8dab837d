"""Alignment from factors against dense float64 columns."""

from __future__ import annotations

import pytest
import torch
from toys import factors, of_two, toy_pair

from ziplora_core.analysis import (
    column_alignment,
    column_cosines,
    column_interference,
    energy_share,
    sampled_elements,
)
from ziplora_core.blocks import block_name
from ziplora_core.coefficients import Coefficients
from ziplora_core.lora_set import Factors


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3, 3)])
def test_cosines_equal_dense(shape):
    content, style = factors(shape, 2, 1, 0.5), factors(shape, 4, 2, -1.5)
    m_c = torch.tensor([1.0, 0.5, 0.0, -1.0, 2.0])
    m_s = torch.tensor([1.0, 0.0, 1.0, 1.0, -2.0])
    dense = [f.scale * torch.einsum("or,ri...->oi...", f.up, f.down) for f in (content, style)]
    expected = []
    for j in range(5):
        a, b = dense[0][:, j].flatten() * m_c[j], dense[1][:, j].flatten() * m_s[j]
        product = a.norm() * b.norm()
        expected.append((a @ b / product).item() if product > 0 else 0.0)
    cosines = column_cosines(content, style, m_c, m_s)
    torch.testing.assert_close(cosines, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_zero_columns_and_single_loras_count_as_unaligned():
    zero = Factors(torch.zeros(3, 1), torch.ones(1, 2))
    assert column_cosines(zero, factors((3, 2), 1, 0), torch.ones(2), torch.ones(2)).tolist() == [0.0, 0.0]
    pair = toy_pair()
    alignment = column_alignment(pair, Coefficients.ones(pair))
    assert set(alignment) == {"conv", "first", "second"}


def test_overlap_and_ownership():
    c = Coefficients(
        of_two({"a": torch.tensor([1.0, 0.0, 1.0, 0.1]), "x": torch.ones(1)}, {"a": torch.tensor([1.0, 1, 0, 0.1])})
    )
    assert c.overlap() == pytest.approx((1 + 0 + 0 + 0.01) / 4)
    assert c.ownership() == {"content": 0.25, "style": 0.25, "both": 0.25, "neither": 0.25}
    assert Coefficients(of_two({}, {})).overlap() == 0.0


def test_interference_is_the_weighted_cosine():
    pair = toy_pair()
    ones = Coefficients.ones(pair)
    g = torch.Generator().manual_seed(0)
    random = Coefficients(
        {c: {k: torch.randn(m.shape, generator=g) for k, m in s.items()} for c, s in ones.by_concept.items()}
    )
    found, direct = column_interference(pair, random), column_interference(pair, ones)
    assert list(found) == ["conv", "first", "second"]
    for name in found:
        cosines = column_cosines(*pair.layers[name].values(), ones["content"][name], ones["style"][name])
        assert direct[name] == pytest.approx(cosines.abs().mean().item())
        weights = random["content"][name].double() * random["style"][name].double()
        assert found[name] == pytest.approx((cosines * weights).abs().mean().item(), rel=1e-6)
    closed = Coefficients({**ones.by_concept, "content": {k: m * 0 for k, m in ones["content"].items()}})
    assert set(column_interference(pair, closed).values()) == {0.0}


def test_elements_are_those_of_whole_rows():
    pair = toy_pair()
    every = torch.cat(
        [
            (f.scale * torch.einsum("or,ri...->oi...", f.up, f.down)).flatten()
            for layer in pair.layers.values()
            for concept, f in layer.items()
            if concept == "style"
        ]
    )
    found = sampled_elements(pair, "style", rows=100)
    torch.testing.assert_close(found.sort().values, every.float().sort().values)
    some = sampled_elements(pair, "style", rows=2, seed=3)
    assert torch.equal(some, sampled_elements(pair, "style", rows=2, seed=3))
    start = 0
    for layer in pair.layers.values():
        f = layer.get("style")
        if f is None:
            continue
        whole = (f.scale * torch.einsum("or,ri...->oi...", f.up.double(), f.down.double())).flatten(1)
        rows = some[start : start + 2 * whole.shape[1]].reshape(2, -1)
        start += rows.numel()
        nearest = torch.cdist(rows.double(), whole).argmin(1)
        assert nearest[0] != nearest[1]
        torch.testing.assert_close(rows, whole[nearest].float())  # another product: equal but for its rounding
    assert start == len(some) < len(every)


def test_share_of_energy():
    assert energy_share(torch.tensor([3.0, -4.0, 0.0, 0.0]), 0.25) == pytest.approx(16 / 25)
    assert energy_share(torch.tensor([1.0, 1.0]), 1.0) == 1.0
    assert energy_share(torch.zeros(4), 0.5) == 0.0 == energy_share(torch.zeros(0), 0.5)


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        ("diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight", "input 4"),
        ("diffusion_model.middle_block.1.transformer_blocks.3.attn2.to_k.weight", "middle"),
        ("diffusion_model.output_blocks.0.1.proj_in.weight", "output 0"),
        ("diffusion_model.double_blocks.3.img_attn.qkv.weight", "double 3"),
        ("diffusion_model.layers.7.attention.qkv.weight", "layers 7"),
        ("diffusion_model.transformer_blocks.1.attn.to_q.weight", "transformer 1"),
        ("diffusion_model.x_embedder.weight", ""),
    ],
)
def test_blocks_have_short_names(layer, name):
    assert block_name(layer) == name
