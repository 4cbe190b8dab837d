"""The benchmark's mask on the rank axis: its gradient is autograd's, and what it gives is what was learned."""

from __future__ import annotations

import pytest
import tiny
import torch


@pytest.fixture
def mask(pack):
    from benchmarks import rank_mask

    return rank_mask


@pytest.fixture
def loras(pack):
    """Unequal ranks, a convolution, and a layer that one LoRA alone changes."""
    core, g = pack.ziplora_core.lora_set, torch.Generator().manual_seed(0)

    def factors(rank, *shape):
        return core.Factors(
            torch.randn(shape[0], rank, generator=g).double(),
            torch.randn(rank, *shape[1:], generator=g).double(),
            0.5 + rank / 4,
        )

    shapes = {"linear": (6, 5), "convolution": (4, 3, 3, 3)}
    layers = {n: tiny.of_two(factors(2, *shape), factors(3, *shape)) for n, shape in shapes.items()}
    return core.LoRASet(core.CONCEPTS, layers | {"alone": {"style": factors(3, 7, 5)}})


def test_the_gradient_of_a_mask_is_autograds(mask, loras):
    joined = mask.MaskedSet(loras, dtype=torch.float64)
    g = torch.Generator().manual_seed(1)
    flat = torch.randn(joined.flatten(joined.ones()).shape, generator=g, dtype=torch.float64).requires_grad_()
    assert len(flat) == 2 * (2 + 3) + 3 and not list(joined.shared_columns(flat))
    inputs = {"linear": (4, 5), "convolution": (2, 3, 5, 5), "alone": (4, 5)}
    inputs = {n: torch.randn(shape, generator=g, dtype=torch.float64) for n, shape in inputs.items()}

    class Nothing:
        def __init__(self, name):
            self.shape = (2, 4, 5, 5) if name == "convolution" else (4, loras.layers[name]["style"].shape[0])

        def forward(self, x):
            return x.new_zeros(self.shape)

    def options(name):
        return {"stride": 1, "padding": 1, "dilation": 1} if name == "convolution" else {}

    def loss(outputs):
        return sum((y * torch.linspace(-1, 2, y.numel()).double().view(y.shape)).pow(2).sum() for y in outputs)

    def dense(name, x, masks):
        parts = []
        for concept, f in loras.layers[name].items():
            ranks = masks[concept][name].view(-1, *[1] * (f.down.ndim - 1))
            update = f.scale * torch.einsum("or,ri...->oi...", f.up, ranks * f.down)
            parts.append(torch.conv2d(x, update, padding=1) if x.ndim == 4 else x @ update.T)
        return sum(parts)

    branch = joined.student(flat)
    ours = [branch.layer(n, x, Nothing(n), **options(n)) for n, x in inputs.items()]
    theirs = [dense(n, x, joined.split(flat)) for n, x in inputs.items()]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    (found,), (expected,) = torch.autograd.grad(loss(ours), flat), torch.autograd.grad(loss(theirs), flat)
    torch.testing.assert_close(found, expected)

    merged = mask.masked(loras, joined.split(flat.detach()))
    for name, x in inputs.items():
        whole = [(f.up * f.scale, f.down) for f in merged.layers[name].values()]
        update = sum(torch.einsum("or,ri...->oi...", up, down) for up, down in whole)
        again = torch.conv2d(x, update, padding=1) if x.ndim == 4 else x @ update.T
        torch.testing.assert_close(again, dense(name, x, joined.split(flat)).detach())
