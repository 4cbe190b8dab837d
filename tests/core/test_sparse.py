"""Top elements against a sort of the dense update."""

from __future__ import annotations

import pytest
import torch
from toys import factors

from ziplora_core.lora_set import Factors
from ziplora_core.sparse import top_elements


@pytest.mark.parametrize("shape", [(7, 5), (5, 3, 3, 3)])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 1.0])
def test_keeps_the_largest_and_says_what_they_hold(shape, share):
    f = factors(shape, 3, 1, -0.7)
    dense = (f.scale * torch.einsum("or,ri...->oi...", f.up, f.down)).float()
    sparse, held = top_elements(f, share)
    count = max(1, round(share * dense.numel()))
    order = dense.abs().flatten().argsort(descending=True)
    expected = torch.zeros(dense.numel())
    expected[order[:count]] = dense.flatten()[order[:count]]
    torch.testing.assert_close(sparse.flatten(), expected)
    assert held == pytest.approx((expected.square().sum() / dense.square().sum()).item(), rel=1e-5)


def test_zeros_stay_zeros():
    sparse, held = top_elements(Factors(torch.zeros(3, 1), torch.ones(1, 2)), 0.5)
    assert not sparse.any() and held == 1.0
