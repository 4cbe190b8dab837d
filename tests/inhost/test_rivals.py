"""The published merges of the quality table: worked examples, and what each must be in the limit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch


@pytest.fixture
def rivals(pack):
    from benchmarks import rivals

    return rivals


def updates(seed: int = 0, rank: int = 3):
    g = torch.Generator().manual_seed(seed)

    def update():
        pair = torch.randn(8, rank, generator=g), torch.randn(rank, 6, generator=g)
        return (pair[0] @ pair[1]).double()

    return update(), update()


def test_ties_by_hand(rivals):
    content = torch.tensor([[4.0, -3.0, 0.5, 1.0]], dtype=torch.float64)
    style = torch.tensor([[2.0, 5.0, -0.1, 3.0]], dtype=torch.float64)
    # half is kept: (4, -3, 0, 0) and (0, 5, 0, 3); signs +, +, 0, +; the mean of those that agree
    assert rivals.ties(0.5)(content, style).tolist() == [[4.0, 5.0, 0.0, 3.0]]
    assert rivals.ties(1.0)(content, content).equal(content)


def test_dare_keeps_the_sum_on_average(rivals):
    content, style = updates()
    rule = rivals.dare(0.5, seed=3)
    mean = torch.stack([rule(content, style) for _ in range(4000)]).mean(0)
    spread = ((content**2 + style**2) / 4000).sqrt()
    assert ((mean - content - style).abs() < 6 * spread + 1e-12).all()
    assert rivals.dare(0.0)(content, style).equal(content + style)


def test_knots_has_the_ties_of_a_common_basis(rivals):
    content, style = updates()
    merged = rivals.knots(1.0)(content, style)
    left, values, right = torch.linalg.svd(torch.cat([content, style], 1), full_matrices=False)
    flipped = left * -1, values, right * -1  # the basis is free up to signs: the result is not to depend on them
    parts = (flipped[1][:, None] * flipped[2])[:6].split(6, dim=1)
    torch.testing.assert_close(merged, flipped[0][:, :6] @ rivals.ties(1.0)(*parts))
    torch.testing.assert_close(rivals.knots(1.0)(content, content), content)


def test_tsv_adds_what_is_orthogonal_and_halves_the_rank(rivals):
    basis = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    other = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).Q
    content = 3 * torch.outer(basis[0], other[0]) + 2 * torch.outer(basis[1], other[1])
    style = 5 * torch.outer(basis[2], other[2]) + 4 * torch.outer(basis[3], other[3])
    largest = 3 * torch.outer(basis[0], other[0]) + 5 * torch.outer(basis[2], other[2])
    torch.testing.assert_close(rivals.tsv(content, style), largest)


def test_the_optimizers_choice_follows_the_signs(rivals):
    content, _ = updates()
    content = content.abs().clamp_max(1) + 1  # nothing differs: the mean
    assert rivals.lora_optimizer(content, 3 * content).equal(2 * content)
    opposed = content * torch.tensor([1.0, -1.0]).repeat(24).reshape(8, 6)
    merged = rivals.lora_optimizer(content, 10 * opposed)  # over twice as large: it decides where they differ
    assert (merged.sign() == opposed.sign()).double().mean() >= 0.89  # a tenth is trimmed away


def test_k_lora_has_one_lora_in_each_layer_and_the_style_in_the_last_steps(rivals, pack):
    core, g = pack.ziplora_core, torch.Generator().manual_seed(0)
    layers = {
        str(i): {
            concept: core.lora_set.Factors(torch.randn(8, 2, generator=g), torch.randn(2, 6, generator=g))
            for concept in core.lora_set.CONCEPTS
        }
        for i in range(12)
    }
    pair = core.lora_set.LoRASet(core.lora_set.CONCEPTS, layers)
    ones = core.coefficients.Coefficients.ones(pair)
    merge = rivals.k_lora(SimpleNamespace(ones=ones, fitted=SimpleNamespace(loras=pair)), 20)
    shares = []
    for coefficients in merge.by_step:
        of_layers = [{c: set(m.tolist()) for c, m in coefficients.of_layer(name).items()} for name in layers]
        assert all(of in ({"content": {1}, "style": {0}}, {"content": {0}, "style": {1}}) for of in of_layers)
        shares.append(sum(of["style"] == {1} for of in of_layers))
    assert shares == sorted(shares) and shares[0] <= 2 and shares[-1] >= 10  # the style's factor is .5, then 1.45
    assert merge.coefficients is ones
