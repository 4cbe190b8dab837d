"""Export against dense algebra in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toys import merged_layers, toy_pair

from ziplora_core import export
from ziplora_core.coefficients import Coefficients
from ziplora_core.merge import merged_factors


@pytest.fixture
def layers():
    pair = toy_pair()
    g = torch.Generator().manual_seed(5)
    ones = Coefficients.ones(pair)
    m = {c: {k: torch.randn(m.shape, generator=g) for k, m in of.items()} for c, of in ones.by_concept.items()}
    return {name: (up, down) for name, up, down in merged_layers(pair, Coefficients(m))}


def dense(up, down):
    return up.double() @ down.double().flatten(1)


def test_whole_rank_is_left_alone(layers):
    for up, down in layers.values():
        for rank in (0, down.shape[0], 1000):
            layer = export.cut(up, down, rank)
            assert layer.up is up and layer.down is down and layer.kept == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.float8_e4m3fn])
def test_whole_is_the_merge_rounded_once(dtype, stored):
    for name, layer in toy_pair().layers.items():
        layer = {c: replace(f, up=f.up.to(stored), down=f.down.to(stored), scale=1 / 3) for c, f in layer.items()}
        m = {c: torch.randn(f.columns) for c, f in layer.items()}
        found = export.whole(layer, m, dtype)
        up, down = merged_factors(layer, m)
        assert torch.equal(found.up, up.to(dtype)) and torch.equal(found.down, down.to(dtype)), name


@pytest.mark.parametrize("rank", [1, 2])
def test_error_is_the_discarded_singular_values(layers, rank):
    cut = 0
    for up, down in layers.values():
        up, down = up.double(), down.double()
        layer = export.cut(up, down, rank)
        whole = dense(up, down)
        values = torch.linalg.svdvals(whole)
        error = torch.linalg.matrix_norm(dense(layer.up, layer.down) - whole)
        assert error.item() == pytest.approx(values[rank:].square().sum().sqrt().item(), rel=1e-9, abs=1e-12)
        assert layer.kept == pytest.approx((values[:rank].square().sum() / values.square().sum()).item(), rel=1e-9)
        assert layer.rank == min(rank, down.shape[0]) and layer.down.shape[1:] == down.shape[1:]
        cut += layer.rank < down.shape[0]
    assert cut


def test_a_merge_of_zeros_is_cut_without_complaint():
    layer = export.cut(torch.zeros(5, 4), torch.zeros(4, 3), 2)
    assert layer.kept == 1.0 and not layer.up.any() and layer.rank == 2


def test_numbers_that_do_not_fit_are_refused_by_layer():
    layer = export.ExportLayer(torch.full((2, 1), 1e6), torch.ones(1, 2))
    with pytest.raises(ValueError, match="'here'.*too large for torch.float16.*bf16 or fp32"):
        export.rounded("here", layer, torch.float16)
    rounded = export.rounded("here", layer, torch.bfloat16)
    assert rounded.up.dtype is rounded.down.dtype is torch.bfloat16 and rounded.kept == layer.kept
