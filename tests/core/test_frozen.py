"""A frozen layer with the pair on it: the written-out backward against finite differences, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from toys import Dense, factors, of_two

from ziplora_core.branch import JoinedSet
from ziplora_core.lora_set import CONCEPTS, LoRASet

SHAPES = {"linear": ((5, 4), (2, 3, 4)), "convolution": ((5, 3, 3, 3), (2, 3, 4, 4))}


def problem(kind: str, halves: str, dtype=torch.float64):
    shape, x_shape = SHAPES[kind]
    content = factors(shape, 2, 0, 0.7) if halves != "style" else None
    style = factors(shape, 3, 1, 1.3) if halves != "content" else None
    joined = JoinedSet(LoRASet(CONCEPTS, {"layer": of_two(content, style)}), dtype=dtype)
    g = torch.Generator().manual_seed(2)
    x, weight = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in (x_shape, shape))
    m = torch.rand(joined.loras.coefficient_count, generator=g, dtype=torch.float64) + 0.5
    return joined, Dense(weight), x, m


def options(kind: str) -> dict:
    return {"padding": 1} if kind == "convolution" else {}


@pytest.mark.parametrize("halves", ["both", "content", "style"])
@pytest.mark.parametrize("kind", SHAPES)
def test_gradient_is_that_of_finite_differences(kind, halves):
    joined, base, x, m = problem(kind, halves)

    def run(x, m):
        return joined.student(m).layer("layer", x, base, **options(kind))

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), m.requires_grad_()))
    x = x.detach()  # as a prompt's: no gradient of the input
    assert torch.autograd.gradcheck(lambda m: run(x, m), (m,))


@pytest.mark.parametrize("kind", SHAPES)
def test_output_is_the_dense_layers(kind):
    joined, base, x, m = problem(kind, "both")
    parts = joined.split(m)
    dense = torch.zeros_like(base.weight)
    for concept, f in joined.loras.layers["layer"].items():
        update = f.scale * torch.einsum("or,ri...->oi...", f.up, f.down)
        dense += update * parts[concept]["layer"].reshape(1, -1, *[1] * (x.ndim - 2 if kind == "convolution" else 0))
    got = joined.student(m).layer("layer", x, base, **options(kind))
    torch.testing.assert_close(got, Dense(base.weight + dense).forward(x))


@pytest.mark.parametrize("tokens", [1, 77])
def test_a_linear_layer_keeps_its_input_and_nothing_else(tokens):
    joined, base, _, m = problem("linear", "both", torch.float32)
    x, flat = torch.randn(2, tokens, 4, requires_grad=True), m.float().requires_grad_()
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        joined.student(flat).layer("layer", x, base)
    assert kept.pop(flat.untyped_storage().data_ptr()) == flat.numel() * 4  # all layers' coefficients, kept anyhow
    assert list(kept.values()) == [x.numel() * 4]


def test_a_teachers_rows_may_be_folded_into_more():
    """As video models fold frames into rows: content's come first."""
    joined, base, x, _ = problem("linear", "both")
    x = x.repeat(3, 1, 1)
    got = joined.teacher(torch.tensor([0, 1])).layer("layer", x, base)
    for rows, (_, f) in zip((slice(0, 3), slice(3, None)), joined.loras.layers["layer"].items(), strict=True):
        torch.testing.assert_close(got[rows], x[rows] @ (base.weight + f.scale * f.up @ f.down).T)
