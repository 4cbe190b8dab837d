"""Eq. 3 against a dense transcription written apart from the code, and its gradient against finite differences."""

from __future__ import annotations

import pytest
import torch
from toys import SHAPES, ToyPredictor, toy_pair, toy_references

from ziplora_core.branch import JoinedSet
from ziplora_core.coefficients import Coefficients
from ziplora_core.draws import training_batches
from ziplora_core.gradient import accumulate_gradient
from ziplora_core.lora_set import CONCEPTS
from ziplora_core.objective import PAPER
from ziplora_core.solver import Settings

SETTINGS = Settings(similarity_lambda=0.37, objective=PAPER)
PLAIN = {"content": 1.0, "style": 1.0}


def dense_forward(predictor, x, updates):
    """The toy network with W0 + update formed densely in every layer; one row."""
    for name in SHAPES:
        weight = predictor.weights[name] + updates.get(name, 0)
        if x.ndim == 4:
            x = torch.tanh(torch.nn.functional.conv2d(x, weight, padding=1)).mean((2, 3))
        else:
            x = torch.tanh(torch.nn.functional.linear(x, weight))
    return x


def dense_loss(predictor, pair, batch, m):
    """‖D(x_c) with L_m − with L_c‖ + ‖D(x_s) with L_m − with L_s‖ + λ Σ|m_c·m_s|, m[name] = {concept: vector}."""
    own = {"content": {}, "style": {}}
    merged = {}
    for name, layer in pair.layers.items():
        for concept, f in layer.items():
            delta = f.scale * torch.einsum("or,ri...->oi...", f.up, f.down)
            own[concept][name] = delta
            columns = m[name][concept].reshape(1, -1, *[1] * (delta.ndim - 2))
            merged[name] = merged.get(name, 0) + delta * columns
    x = predictor.noisy(batch)
    loss = 0.0
    for row, place in enumerate(batch.concept_index.tolist()):
        teacher = dense_forward(predictor, x[row : row + 1], own[CONCEPTS[place]])
        student = dense_forward(predictor, x[row : row + 1], merged)
        loss = loss + ((student - teacher) ** 2).sum().sqrt() / (len(batch.concept_index) / 2)
    for name, layer in pair.layers.items():
        if len(layer) == 2:
            loss = loss + SETTINGS.similarity_lambda * (m[name]["content"] @ m[name]["style"]).abs()
    return loss


@pytest.fixture(params=[1, 3], ids=["batch 1", "batch 3"])
def problem(request):
    pair, predictor = toy_pair(), ToyPredictor()
    joined = JoinedSet(pair, dtype=torch.float64)
    batches = next(training_batches(toy_references(), predictor, Settings(batch_size=request.param)))
    g = torch.Generator().manual_seed(3)
    flat = torch.randn(pair.coefficient_count, generator=g, dtype=torch.float64)
    return pair, predictor, joined, batches, flat


def by_layer(joined, flat):
    parts = joined.split(flat)
    return {n: {c: parts[c][n] for c in parts if n in parts[c]} for n in SHAPES}


def test_loss_equals_dense_transcription(problem):
    pair, predictor, joined, batches, flat = problem
    assert len(batches) == 1, "content and style should share one pass"
    losses = accumulate_gradient(joined, predictor, flat.requires_grad_(), batches, SETTINGS, PLAIN)
    expected = dense_loss(predictor, pair, batches[0], by_layer(joined, flat))
    assert losses.total == pytest.approx(expected.item(), rel=1e-12)
    assert losses.total == pytest.approx(
        losses.retention["content"] + losses.retention["style"] + SETTINGS.similarity_lambda * losses.overlap, rel=1e-12
    )


def test_gradient_equals_finite_differences(problem):
    pair, predictor, joined, batches, flat = problem
    accumulate_gradient(joined, predictor, flat.requires_grad_(), batches, SETTINGS, PLAIN)
    h = 1e-6
    with torch.no_grad():
        for i in range(len(flat)):
            ends = []
            for sign in (h, -h):
                moved = flat.detach().clone()
                moved[i] += sign
                ends.append(dense_loss(predictor, pair, batches[0], by_layer(joined, moved)).item())
            assert flat.grad[i].item() == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-6, abs=1e-7)


def test_one_at_a_time_adds_up_to_the_batch(problem):
    _, predictor, joined, batches, flat = problem
    together = flat.clone().requires_grad_()
    a = accumulate_gradient(joined, predictor, together, batches, SETTINGS, PLAIN)
    apart = flat.clone().requires_grad_()
    half = len(batches[0].concept_index) // 2
    split = [
        type(batches[0])(
            **{k: getattr(batches[0], k)[rows] for k in ("latents", "noise", "timesteps", "concept_index")}
        )
        for rows in (slice(0, half), slice(half, None))
    ]
    b = accumulate_gradient(joined, predictor, apart, split, SETTINGS, PLAIN)
    assert a.total == pytest.approx(b.total, rel=1e-12)
    torch.testing.assert_close(together.grad, apart.grad, rtol=1e-10, atol=1e-12)


def test_teacher_rows_see_their_own_lora_only(problem):
    """The direct merge with one side's coefficients at zero is that side's teacher."""
    pair, predictor, joined, batches, _ = problem
    batch = batches[0]
    with torch.no_grad():
        teacher = predictor(batch, joined.teacher(batch.concept_index))
        ones = Coefficients.ones(pair)
        content = predictor(batch, joined.student(joined.flatten(ones.scaled(style=0.0))))
        style = predictor(batch, joined.student(joined.flatten(ones.scaled(content=0.0))))
    torch.testing.assert_close(teacher[batch.concept_index == 0], content[batch.concept_index == 0])
    torch.testing.assert_close(teacher[batch.concept_index == 1], style[batch.concept_index == 1])
    assert not torch.allclose(content, style)


def test_flat_vector_round_trip(problem):
    _, _, joined, _, flat = problem
    coefficients = joined.unflatten(flat)
    assert sum(m.numel() for side in coefficients.by_concept.values() for m in side.values()) == len(flat)
    torch.testing.assert_close(joined.flatten(coefficients), flat.detach().float().double())
