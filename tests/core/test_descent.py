"""The descent to the coefficients, written again: dense float64 algebra, autograd's gradient, Adam by its formula."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_objective import dense_forward
from toys import SHAPES, ToyPredictor, toy_pair, toy_references

from benchmarks.objectives import mean_square
from ziplora_core import layerwise
from ziplora_core.branch import JoinedSet
from ziplora_core.coefficients import Coefficients
from ziplora_core.direct.np_lora import soften
from ziplora_core.draws import spread_batches, training_batches
from ziplora_core.gradient import optimize
from ziplora_core.lora_set import CONCEPTS
from ziplora_core.objective import BALANCED, PAPER, Objective, norm, overlap_percent
from ziplora_core.retention import measure_retention
from ziplora_core.solver import SOLVERS, NotFinite, Settings
from ziplora_core.zipper import solve

SQUARES = Objective("squares", mean_square, overlap_percent, relative=True)


class Recorded(ToyPredictor):
    """Keeps the batch of each pass with a gradient; `spoil` says for which of them the gradient overflows."""

    def __init__(self, joins=True, loss_scale=1.0, spoil=lambda gradient: False):
        super().__init__(joins)
        self.loss_scale, self.spoil = loss_scale, spoil
        self.learned, self.overflowed = [], 0

    def __call__(self, batch, branch):
        y = super().__call__(batch, branch)
        if y.requires_grad:
            self.learned.append(batch)
            y.register_hook(self.overflow)
        return y

    def overflow(self, gradient):
        if not self.spoil(gradient):
            return gradient
        self.overflowed += 1
        self.learned.pop()
        return gradient * float("inf")


def dense_updates(pair, m=None, only=None):
    """Layer -> ΔW of one LoRA, or of both with coefficients m[concept][layer]."""
    updates = {}
    for name, layer in pair.layers.items():
        for concept, f in layer.items():
            if only in (None, concept):
                delta = f.scale * torch.einsum("or,ri...->oi...", f.up.double(), f.down.double())
                if m is not None:
                    delta = delta * m[concept][name].reshape(1, -1, *[1] * (delta.ndim - 2))
                updates[name] = updates.get(name, 0) + delta
    return updates


def dense_retentions(predictor, pair, batch, updates, squared=False):
    """Concept -> its retention in a batch: each row's norm, averaged; or the mean square."""
    x, found = predictor.noisy(batch), {}
    for concept in CONCEPTS:
        rows = x[batch.concept_index == CONCEPTS.index(concept)]
        if len(rows):
            off = dense_forward(predictor, rows, updates)
            off = off - dense_forward(predictor, rows, dense_updates(pair, only=concept))
            found[concept] = off.square().mean() if squared else off.square().sum(1).sqrt().mean()
    return found


def dense_overlap(pair, m, objective):
    shared = [n for n, layer in pair.layers.items() if len(layer) == 2]
    products = [m["content"][n] * m["style"][n] for n in shared]
    return sum(p.sum().abs() for p in products) if objective is PAPER else 100 * torch.cat(products).abs().mean()


def adam(joined, predictor, settings, weights, start, betas):
    """Coefficients after each recorded step, and each step's terms (Kingma & Ba, Algorithm 1)."""
    flat, first, second = start.clone(), 0, 0
    path, terms = [], []
    for number, batch in enumerate(predictor.learned, 1):
        leaf = flat.clone().requires_grad_()
        m = joined.split(leaf)
        kept = dense_retentions(
            predictor, joined.loras, batch, dense_updates(joined.loras, m), settings.objective is SQUARES
        )
        overlap = dense_overlap(joined.loras, m, settings.objective)
        loss = sum(weights[c] * kept[c] for c in kept) + settings.similarity_lambda * overlap
        (gradient,) = torch.autograd.grad(loss, leaf)
        terms.append([*(float(weights[c] * kept[c]) for c in CONCEPTS), float(overlap), float(loss)])
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        step = first / (1 - betas[0] ** number) / ((second / (1 - betas[1] ** number)).sqrt() + 1e-8)
        flat = flat - settings.learning_rate * step
        path.append(flat)
    return path, terms


def ones_weights(joined, predictor, references, settings):
    """Of each retention: its inverse at the direct merge, on noise of its own."""
    if settings.objective is PAPER:
        return dict.fromkeys(CONCEPTS, 1.0)
    batches = spread_batches(references, predictor, settings.seed + 1 + 0x5EED, 4)
    found = dict.fromkeys(CONCEPTS, 0.0)
    for (batch,) in batches:
        kept = dense_retentions(
            predictor, joined.loras, batch, dense_updates(joined.loras), settings.objective is SQUARES
        )
        found = {c: found[c] + float(kept[c]) / 4 for c in CONCEPTS}
    return {c: 1 / value for c, value in found.items()}


def overflowing():
    """A gradient above a limit is infinite, and the limit falls during the run."""
    predictor = Recorded(loss_scale=2.0**20)
    predictor.limit = 2.0**18

    def on_step(step):
        predictor.limit = 2.0**18 / 4 ** (step.index // 2)

    predictor.spoil = lambda gradient: bool(gradient.abs().max() > predictor.limit)
    return predictor, on_step


@pytest.mark.parametrize("objective", [BALANCED, PAPER, SQUARES], ids=lambda objective: objective.name)
@pytest.mark.parametrize("case", ["plain", "scaled", "overflowing", "started"])
def test_a_run_is_adam_on_the_dense_loss(objective, case):
    """Its steps and its losses, also where the loss is scaled, and where the scale falls on the way."""
    joined, references = JoinedSet(toy_pair(), dtype=torch.float64), toy_references()
    settings = Settings(steps=6, learning_rate=0.03, similarity_lambda=0.3, batch_size=2, seed=5, objective=objective)
    predictor, on_step, start, betas = Recorded(), None, None, (0.9, 0.999)
    if case == "scaled":
        predictor.loss_scale = 1024.0
    elif case == "overflowing":
        predictor, on_step = overflowing()
    elif case == "started":
        start, betas = joined.unflatten(torch.linspace(-0.7, 1.2, joined.loras.coefficient_count)), (0.8, 0.999)
    result = optimize(joined, predictor, references, settings, on_step, start)
    weights = ones_weights(joined, predictor, references, settings)
    begun = joined.flatten(start or Coefficients.ones(joined.loras))
    path, terms = adam(joined, predictor, settings, weights, begun, betas)
    expected = path[-1] if start is None else torch.stack(path[-3:]).mean(0)
    assert len(result.history) == len(path) == 6 and (predictor.overflowed > 1) == (case == "overflowing")
    torch.testing.assert_close(joined.flatten(result.coefficients), expected, rtol=1e-4, atol=1e-5)
    for step, wanted in zip(result.history, terms, strict=True):
        losses = step.losses
        assert [*losses.retention.values(), losses.overlap, losses.total] == pytest.approx(wanted, rel=1e-4)


def test_many_overflows_with_steps_between_them_do_not_end_a_run():
    calls = itertools.count()
    predictor = Recorded(spoil=lambda gradient: next(calls) % 2 == 0)
    joined = JoinedSet(toy_pair(), dtype=torch.float64)
    result = optimize(joined, predictor, toy_references(), Settings(steps=15, objective=PAPER))
    assert len(result.history) == predictor.overflowed == 15


def test_a_gradient_that_never_is_finite_ends_it():
    predictor = Recorded(spoil=lambda gradient: True)
    joined = JoinedSet(toy_pair(), dtype=torch.float64)
    with pytest.raises(NotFinite, match="the gradient is not finite although the loss .* tries at smaller loss scales"):
        optimize(joined, predictor, toy_references(), Settings(steps=15, objective=PAPER))


def even(value):
    return lambda columns: torch.full((columns,), value)


def in_turn(first, second):
    return lambda columns: torch.tensor([first, second]).repeat(columns)[:columns]


def symmetric(columns):
    return torch.linspace(-1, 1, columns)


@pytest.mark.parametrize(
    ("content", "style", "closed"),
    [
        (even(0.9), even(0.9), False),
        (even(0.07), even(0.07), False),
        (even(0.007), even(0.007), True),
        (symmetric, even(0.7), False),  # signs cancel in each layer
        (in_turn(1.0, 0.0), in_turn(0.0, 1.0), True),
    ],
    ids=["open", "nearly closed", "closed", "signs cancel", "closed in turn"],
)
def test_ends_early_where_the_zip_is_closed_and_nowhere_else(content, style, closed):
    joined = JoinedSet(toy_pair(), dtype=torch.float64)
    ones = Coefficients.ones(joined.loras)
    start = Coefficients(
        {c: {n: of(len(m)) for n, m in ones[c].items()} for c, of in zip(CONCEPTS, (content, style), strict=True)}
    )
    settings = Settings(steps=3, learning_rate=1e-8)
    result = optimize(joined, ToyPredictor(), toy_references(), settings, start=start)
    assert len(result.history) == (1 if closed else 3)
    assert ("overlap" in result.stopped) == closed


@pytest.mark.parametrize("timesteps", [50, 1000])
def test_batches_take_every_reference_fresh_noise_and_the_whole_schedule(timesteps):
    predictor, references = ToyPredictor(), toy_references()
    predictor.timesteps = timesteps

    def drawn(seed):
        settings = Settings(batch_size=2, seed=seed)
        return [batch for (batch,) in itertools.islice(training_batches(references, predictor, settings), 16)]

    batches = drawn(0)
    for concept, wanted in (("content", references["content"]), ("style", references["style"])):
        rows = [batch.concept_index == CONCEPTS.index(concept) for batch in batches]
        latents = torch.cat([batch.latents[chosen] for batch, chosen in zip(batches, rows, strict=True)])
        found = {tuple(row.flatten().tolist()) for row in latents}
        assert found == {tuple(row.flatten().tolist()) for row in wanted}
        timestep = torch.cat([batch.timesteps[chosen] for batch, chosen in zip(batches, rows, strict=True)])
        assert 0 <= int(timestep.min()) < timesteps / 16 and timesteps * 15 / 16 < int(timestep.max()) < timesteps
        # an even spread leaves no gap of twice its width
        assert len(timestep) == 32 and timestep.sort().values.diff().max() < 2.7 * timesteps / 32
    noise = torch.cat([batch.noise.flatten(1) for batch in batches])
    assert len(noise.unique(dim=0)) == len(noise) == 64
    assert abs(float(noise.mean())) < 0.1 and abs(float(noise.std()) - 1) < 0.1
    assert torch.isin(drawn(1)[0].noise, noise).float().mean() < 0.01 and torch.equal(
        drawn(0)[3].noise, batches[3].noise
    )


@pytest.mark.parametrize("joins", [True, False])
@pytest.mark.parametrize("retention", [norm, mean_square])
def test_measured_is_the_dense_mean_over_the_schedule(joins, retention):
    """Also of another pair's coefficients against the LoRAs of this one."""
    joined, references = JoinedSet(toy_pair(), dtype=torch.float64), toy_references()
    predictor, seen = ToyPredictor(joins), []
    call = predictor.__call__

    class Watched(ToyPredictor):
        def __call__(self, batch, branch):
            seen.append(batch)
            return call(batch, branch)

    watched = Watched(joins)
    merged = JoinedSet(soften(joined.loras, 3.0), dtype=torch.float64)
    g = torch.Generator().manual_seed(2)
    candidates = [joined.unflatten(torch.randn(joined.loras.coefficient_count, generator=g)) for _ in range(2)]
    for other in (None, merged):
        seen.clear()
        found = measure_retention(joined, watched, references, candidates, 7, 3, retention, other)
        batches = seen[::3]  # the teacher's pass, and one for each candidate
        timesteps = torch.cat([batch.timesteps for batch in batches]).unique()
        assert timesteps.tolist() == [166, 500, 833]  # the middles of three parts of the schedule
        for candidate, measured in zip(candidates, found, strict=True):
            student = (other or joined).loras
            updates = dense_updates(student, joined.split(joined.flatten(candidate)))
            expected = dict.fromkeys(CONCEPTS, 0.0)
            for batch in batches:
                kept = dense_retentions(predictor, joined.loras, batch, updates, retention is mean_square)
                for concept, value in kept.items():
                    expected[concept] += float(value) / 3
            assert measured == pytest.approx(expected, rel=1e-6)
    again = measure_retention(joined, watched, references, candidates[:1], 8, 3, retention)
    assert again[0]["content"] != pytest.approx(found[0]["content"], rel=1e-6)


def test_the_gradient_goes_on_from_the_layerwise_solution():
    """A rate of nearly nothing leaves the start as it is: solved with the run's seed and ridge."""
    joined, references, told = JoinedSet(toy_pair(), dtype=torch.float64), toy_references(), []
    changes = {"seed": 9, "ridge": 0.2, "steps": 2, "learning_rate": 1e-8}
    expected = layerwise.merge(joined, ToyPredictor(), references, 9, ridge=0.2)
    for solver in ("layerwise", "layerwise, then gradient"):
        settings, layers = Settings(solver=solver, **changes), []
        assert settings.gradient_steps == (0 if solver == "layerwise" else 2)
        told.clear()
        predictor = ToyPredictor()
        result = solve(joined, predictor, references, settings, told.append, layers.append)
        torch.testing.assert_close(joined.flatten(result.coefficients), joined.flatten(expected), rtol=1e-4, atol=1e-5)
        assert [step.index for step in told] == list(range(1, settings.gradient_steps + 1))
        assert [layer.name for layer in layers] == list(result.relative_error) == list(SHAPES)
        assert result.relative_error == {layer.name: layer.relative_error for layer in layers}
        assert solver != "layerwise" or predictor.calls == layerwise.DRAWS
    other = solve(joined, ToyPredictor(), references, Settings(**{**changes, "seed": 10}))
    assert not torch.allclose(joined.flatten(other.coefficients), joined.flatten(expected), rtol=1e-4)
    assert Settings(solver=SOLVERS[1], steps=7).gradient_steps == 7
