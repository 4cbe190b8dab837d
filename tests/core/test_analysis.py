"""Alignment from factors against dense float64 columns."""

from __future__ import annotations

import pytest
import torch
from toys import factors, toy_pair

from ziplora_core.analysis import column_alignment, column_cosines
from ziplora_core.coefficients import Coefficients
from ziplora_core.pair import Factors, LayerPair


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
    cosines = column_cosines(LayerPair(content, style), m_c, m_s)
    torch.testing.assert_close(cosines, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_zero_columns_and_single_loras_count_as_unaligned():
    zero = Factors(torch.zeros(3, 1), torch.ones(1, 2))
    both = LayerPair(zero, factors((3, 2), 1, 0))
    assert column_cosines(both, torch.ones(2), torch.ones(2)).tolist() == [0.0, 0.0]
    pair = toy_pair()
    alignment = column_alignment(pair, Coefficients.ones(pair))
    assert set(alignment) == {"conv", "first", "second"}


def test_overlap_and_ownership():
    c = Coefficients(
        {"a": torch.tensor([1.0, 0.0, 1.0, 0.1]), "x": torch.ones(1)}, {"a": torch.tensor([1.0, 1, 0, 0.1])}
    )
    assert c.overlap() == pytest.approx((1 + 0 + 0 + 0.01) / 4)
    assert c.ownership() == {"content": 0.25, "style": 0.25, "both": 0.25, "neither": 0.25}
    assert Coefficients({}, {}).overlap() == 0.0
