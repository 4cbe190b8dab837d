"""The merge by the weights alone against dense float64 least squares, and its limits."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from toys import of_two, toy_pair

from ziplora_core import shares
from ziplora_core.direct import METHODS
from ziplora_core.lora_set import CONCEPTS, Factors, LoRASet, column_grams, columns


def random_factors(seed: int, rank: int, size: float = 1.0, kernel: tuple[int, ...] = ()) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(10, rank, generator=generator)
    down = torch.randn(rank, 6, *kernel, generator=generator) * torch.linspace(0.1, 2, 6).view(1, 6, *[1] * len(kernel))
    return Factors(up, down, size)


def dense(factors: Factors) -> torch.Tensor:
    """ΔW with what belongs to a column in one axis: (rows, columns) float64."""
    delta = torch.einsum("or,ri...->oi...", factors.up.double(), factors.down.double()) * factors.scale
    return delta.movedim(1, -1).flatten(0, -2)


def least_squares(factors: list[Factors], ridge: float, active: torch.Tensor) -> torch.Tensor:
    """(n, columns): the sum that the module's first lines state, stacked as rows and solved column by column."""
    deltas = torch.stack([dense(f) for f in factors])  # n, rows, columns
    added = []
    for r, d in enumerate(deltas):
        others = [k for k in range(len(deltas)) if k != r]
        sizes = [deltas[k].square().sum() for k in others]
        under = [(active[:, k] * d.square().sum(0)).sum() for k in others]
        added.append(sum(s * u for s, u in zip(sizes, under, strict=True)) / sum(sizes))
    v = torch.stack([c * weight for c, weight in zip(active.T, added, strict=True)])
    pull = (ridge * float((v.sum(0) * deltas.square().sum(1)).mean())) ** 0.5
    solved = []
    for a, weights in zip(deltas.unbind(-1), v.T.tolist(), strict=True):
        rows = [w**0.5 * a.T for w in weights] + [pull * torch.eye(len(a), dtype=a.dtype)]
        wanted = [w**0.5 * a[k] for k, w in enumerate(weights)] + [pull * torch.ones(len(a), dtype=a.dtype)]
        solved.append(torch.linalg.lstsq(torch.cat(rows), torch.cat(wanted)[:, None]).solution[:, 0])
    return torch.stack(solved, 1)


@pytest.mark.parametrize("kernel", [(), (3, 3)])
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("ridge", [0.03, 0.3, 3.0])
@pytest.mark.parametrize("measured", [False, True])
def test_coefficients_are_the_least_squares(count: int, kernel: tuple[int, ...], ridge: float, measured: bool) -> None:
    factors = [random_factors(k, 2 + k, 0.5 + 0.4 * k, kernel) for k in range(count)]
    active = torch.rand(6, count, generator=torch.Generator().manual_seed(9)) ** 4 if measured else None
    found = torch.stack(shares.share(factors, ridge, active).coefficients)
    expected = least_squares(factors, ridge, torch.ones(6, count).double() if active is None else active.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert (found - 1).abs().max() > 0.1, "near the direct merge the comparison shows little"


def test_permuting_loras_permutes_the_result() -> None:
    factors = [random_factors(k, 3, 1 + k) for k in range(3)]
    active = torch.rand(6, 3, generator=torch.Generator().manual_seed(9))
    first = shares.share(factors, active=active).coefficients
    for order in permutations(range(3)):
        again = shares.share([factors[k] for k in order], active=active[:, order]).coefficients
        torch.testing.assert_close(again, [first[k] for k in order], rtol=1e-6, atol=1e-7)


def test_one_lora_stays_what_it_is() -> None:
    for active in (None, torch.rand(6, 1)):
        solved = shares.share([random_factors(0, 3)], active=active)
        assert solved.relative_error == 1.0
        torch.testing.assert_close(solved.coefficients[0], torch.ones(6), rtol=0, atol=1e-6)


def test_a_layer_in_which_nothing_is_active_stays() -> None:
    for found in shares.share([random_factors(k, 3) for k in range(2)], active=torch.zeros(6, 2)).coefficients:
        assert torch.equal(found, torch.ones(6))


def test_a_large_ridge_is_the_direct_merge() -> None:
    for found in shares.share([random_factors(k, 3) for k in range(3)], ridge=1e9).coefficients:
        torch.testing.assert_close(found, torch.ones(6), rtol=0, atol=1e-6)


def test_strong_columns_share_their_place_and_weak_ones_stay() -> None:
    """Two LoRAs of one size that use orthogonal rows: no column disturbs another; halves and ones are the limits."""
    sizes = torch.tensor([1e-3, 1.0, 1e3])
    ups = torch.eye(4)
    factors = [Factors(ups[:, k : k + 1], sizes[None]) for k in range(2)]
    for found in shares.share(factors, ridge=1e-5).coefficients:
        torch.testing.assert_close(found, torch.tensor([1.0, found[1].item(), 0.5]), rtol=0, atol=1e-4)
        assert 0.5 < found[1] < 1


def test_a_larger_update_has_the_larger_share() -> None:
    grams = column_grams([random_factors(0, 3, 1.0), random_factors(1, 3, 2.0)])
    sizes = grams.sum(0).diagonal()
    torch.testing.assert_close(shares.shares(grams), (sizes / sizes.sum()).expand(6, 2))


@pytest.mark.parametrize("size", [0.0, 1e-6])
@pytest.mark.parametrize("measured", [False, True])
def test_a_third_lora_that_does_next_to_nothing_leaves_a_pair_as_it_is(size: float, measured: bool) -> None:
    """But for the ridge, which is in parts of the mean column of those that add anything."""
    pair = [random_factors(k, 3) for k in range(2)]
    active = torch.rand(6, 3, generator=torch.Generator().manual_seed(9))
    alone = shares.share(pair, active=active[:, :2] if measured else None).coefficients
    ridge = shares.RIDGE * (1.5 if size else 1.0)
    three = shares.share([*pair, random_factors(2, 3, size)], ridge, active if measured else None).coefficients
    for found, expected in zip(three[:2], alone, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (alone[0] - 1).abs().max() > 0.1


def test_a_lora_that_does_nothing_in_a_layer_takes_nothing_from_the_other() -> None:
    nothing = Factors(torch.zeros(10, 2), torch.ones(2, 6))
    found = shares.share([random_factors(0, 3), nothing]).coefficients
    torch.testing.assert_close(found[0], torch.ones(6))
    for all_nothing in shares.share([nothing, nothing]).coefficients:
        torch.testing.assert_close(all_nothing, torch.ones(6))


def test_a_layer_of_one_lora_stays_and_every_layer_has_its_coefficients() -> None:
    pair, found = METHODS["shared columns"](toy_pair())
    for concept in CONCEPTS:
        side = found[concept]
        assert side.keys() == {name for name, layer in pair.layers.items() if concept in layer}
        for name, m in side.items():
            assert m.shape == (columns(pair.layers[name]),) and m.dtype == torch.float32
    alone = [(name, *layer.items()) for name, layer in pair.layers.items() if len(layer) < 2]
    assert alone
    for name, (concept, factors) in alone:
        assert torch.equal(found[concept][name], torch.ones(factors.columns))


def test_an_update_that_is_not_finite_is_named() -> None:
    bad = Factors(torch.full((10, 2), torch.inf), torch.ones(2, 6))
    with pytest.raises(FloatingPointError, match="layer here: "):
        shares.merge(LoRASet(CONCEPTS, {"here": of_two(random_factors(0, 3), bad)}))
