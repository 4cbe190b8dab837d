"""Training written again: which rows a step has, and Adam on their dense float64 loss."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from ziplora_core.lora_set import Factors
from ziplora_core.trained_lora import TrainedLoRA
from ziplora_core.training import Example, Pictures, Settings, step_rows, train

SHAPES = {"a": (6, 4), "b": (4, 6)}
WEIGHTS = {
    n: torch.randn(s, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
    for i, (n, s) in enumerate(SHAPES.items())
}


class Base:
    def __init__(self, name):
        self.weight = WEIGHTS[name].float()

    def forward(self, x):
        return x @ self.weight.T

    def backward(self, grad, shape):
        return grad @ self.weight


class Network:
    """Two layers with tanh between; prompts shift the target, late timesteps make it large. Keeps what it was given."""

    def __init__(self, timesteps=50, loss_scale=1.0, spoil=lambda gradient: False, gain=1.0):
        self.timesteps, self.loss_scale, self.spoil, self.gain = timesteps, loss_scale, spoil, gain
        self.seen, self.lost = [], 0

    def kind(self, prompt):
        return prompt >= 10  # class pictures' prompts are longer

    def inputs(self, rows):
        t = (rows.timesteps.double() / self.timesteps).reshape(-1, 1, 1, 1)
        x = ((1 - t) * rows.latents.double() + t * rows.noise.double()).flatten(1)[:, :4]
        shift = torch.tensor(rows.prompts, dtype=torch.float64)[:, None] / 10
        return x, (6 * t.flatten()[:, None] ** 4 * x.sum(1, keepdim=True) + shift).expand(-1, 4)

    def __call__(self, rows, branch):
        self.seen.append(rows)
        x, target = self.inputs(rows)
        y = self.gain * branch.layer("b", torch.tanh(branch.layer("a", x.float(), Base("a"))), Base("b"))
        if y.requires_grad:
            y.register_hook(self.overflow)
        return y, self.gain * target.float()

    def overflow(self, gradient):
        if not self.spoil(gradient):
            return gradient
        self.lost += 1
        return gradient * math.inf


def picture(prompt, side=2):
    return Example(torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(prompt)), prompt)


def pictures(priors=True):
    """Two concepts, one of them with pictures of two sizes, and class pictures."""
    sets = [[picture(0), picture(1), picture(2, side=3)], [picture(3), picture(4)]]
    return Pictures(sets, [picture(10), picture(11), picture(12)] if priors else ())


class Penalised(TrainedLoRA):
    """With a penalty; keeps what a probe before each step adds to the gradient."""

    def penalty(self):
        return 0.5 * sum((up - 0.1).square().sum() for up in self.up.values())

    def before(self, step, probe):
        for parameter in self.parameters():
            parameter.grad = None
        probe()
        self.probed = [p.grad.double().clone() for p in self.parameters()]


def dense_loss(network, passes, factors, settings):
    """Σ over a step's rows of weight · mean squared error, a picture's weight one of the batch's."""
    total = 0.0
    for rows in passes:
        x, target = network.inputs(rows)
        for name in ("a", "b"):
            x = x @ (WEIGHTS[name] + factors[f"{name} up"] @ factors[f"{name} down"]).T
            x = torch.tanh(x) if name == "a" else x
        weights = [settings.prior_weight if prompt >= 10 else 1.0 for prompt in rows.prompts]
        total = total + sum(w * e for w, e in zip(weights, (network.gain * (x - target)).square().mean(1), strict=True))
    return total / settings.batch_size


def started(settings, kind=TrainedLoRA):
    trained = kind(SHAPES, settings.rank, settings.seed)
    with torch.no_grad():
        for i, up in enumerate(trained.up.values()):
            up.copy_(0.3 * torch.randn(up.shape, generator=torch.Generator().manual_seed(i)))
    return trained


def in_double(trained):
    sides = (("up", trained.up), ("down", trained.down))
    return {f"{name} {side}": p.detach().double().clone() for side, group in sides for name, p in group.items()}


def falling(network, limit, each):
    """A limit of the gradient above which it overflows, lower from step to step."""
    network.limit = limit
    network.spoil = lambda gradient: bool(gradient.abs().max() > network.limit)

    def on_step(step):
        network.limit = limit / each**step.index

    return on_step


@pytest.mark.parametrize("case", ["plain", "scaled", "overflowing", "penalised", "gentle", "goes on"])
def test_a_run_is_adam_on_the_dense_loss(case):
    """Clipped to a norm of one where it is above, and only there."""
    settings = Settings(steps=6, learning_rate=2e-2, rank=2, batch_size=2, seed=3, prior_weight=0.3)
    network = Network(loss_scale=256.0 if case in ("scaled", "overflowing", "penalised", "gentle") else 1.0)
    network.gain = 0.03 if case == "gentle" else 1.0
    on_step = falling(network, 2.0**8, 4) if case == "overflowing" else lambda step: None
    trained = started(settings, Penalised if case == "penalised" else TrainedLoRA)
    factors, first = in_double(trained), 2 if case == "goes on" else 0
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in factors.items()}
    states, probes = [], []

    def keep(step):
        states.append((step, in_double(trained)))
        probes.append(getattr(trained, "probed", None))
        on_step(step)

    history = train(trained, network, pictures(), settings, keep, first)
    assert [step.index for step in history] == list(range(first + 1, 7)) and history == [s for s, _ in states]
    assert (network.lost > 1) == (case == "overflowing")
    norms = []
    for number, (step, state) in enumerate(states, 1):
        passes = step_rows(pictures(), network, settings, step.index - 1)
        leaves = {name: p.clone().requires_grad_() for name, p in factors.items()}
        loss = dense_loss(network, passes, leaves, settings)
        penalty = torch.zeros(())
        gradients = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
        if case == "penalised":
            names = list(leaves)
            order = [names.index(f"{n} {side}") for side in ("down", "up") for n in SHAPES]
            for found, i in zip(probes[number - 1], order, strict=True):
                torch.testing.assert_close(found, 256 * gradients[i], rtol=1e-3, atol=1e-3)
            penalty = 0.5 * sum((p - 0.1).square().sum() for name, p in leaves.items() if "up" in name)
            gradients = torch.autograd.grad(loss + penalty, list(leaves.values()))
        assert step.loss == pytest.approx(float(loss), rel=1e-4) and step.steps == 6
        assert step.penalty == pytest.approx(float(penalty), rel=1e-4)
        norms.append(float(sum(g.square().sum() for g in gradients)) ** 0.5)
        for (name, p), gradient in zip(factors.items(), gradients, strict=True):
            gradient = gradient / max(1.0, norms[-1])
            m, v = moments[name]
            moments[name] = m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            step_size = m / (1 - 0.9**number) / ((v / (1 - 0.999**number)).sqrt() + 1e-8)
            factors[name] = p - settings.learning_rate * step_size
            torch.testing.assert_close(state[name], factors[name], rtol=2e-3, atol=2e-4)
    assert (max(norms) < 1) if case == "gentle" else (max(norms) > 2)


def test_many_overflows_with_steps_between_them_do_not_end_a_run():
    calls = itertools.count()
    network = Network(spoil=lambda gradient: next(calls) % 2 == 0)
    settings = Settings(steps=15, rank=2)
    history = train(started(settings), network, pictures(priors=False), settings)
    assert [step.index for step in history] == list(range(1, 16)) and network.lost == 15


def test_a_gradient_that_never_is_finite_ends_it():
    settings = Settings(steps=15, rank=2)
    with pytest.raises(FloatingPointError, match="step 1: the gradient is not finite although .* 13 tries"):
        train(started(settings), Network(spoil=lambda gradient: True), pictures(), settings)


def test_a_loss_that_is_not_finite_ends_it_with_the_layer_of_the_largest_update():
    settings, trained = Settings(steps=3, rank=2), started(Settings(steps=3, rank=2))
    assert trained.largest() == max(trained.sizes(), key=trained.sizes().__getitem__)
    with torch.no_grad():
        trained.up["a"].mul_(1e-3)
        assert trained.largest() == "b"
        trained.up["a"][0, 0] = math.nan
    assert trained.largest() == "a"
    with pytest.raises(FloatingPointError, match="step 1: the loss is not finite; the largest .* 'a'; lower"):
        train(trained, Network(), pictures(), settings)
    assert TrainedLoRA(SHAPES, 2, 0).largest() is None


@pytest.mark.parametrize("timesteps", [50, 1000])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_rows_of_a_run(batch_size, timesteps):
    """Sets in turn, every picture, fresh noise, the whole schedule; class pictures as many again."""
    network, given = Network(timesteps), pictures()
    examples = {e.prompt: e for e in [*given.sets[0], *given.sets[1], *given.priors]}

    def run(seed):
        settings = Settings(batch_size=batch_size, seed=seed, prior_weight=0.25)
        return [step_rows(given, network, settings, step) for step in range(48 // batch_size)]

    steps = run(0)
    noise, times, drawn = [], [], []
    for number, passes in enumerate(steps):
        prompts = [p for rows in passes for p in rows.prompts]
        shown = sum(p < 10 for p in prompts)
        assert shown == batch_size and len(prompts) == 2 * batch_size
        turns = [(number * batch_size + row) % 2 for row in range(batch_size)]
        assert sorted(p >= 3 for p in prompts if p < 10) == sorted(map(bool, turns))
        for rows in passes:
            assert len({(p >= 10) for p in rows.prompts}) == 1, "class pictures have another kind of prompt"
            weights = [(0.25 if p >= 10 else 1.0) / batch_size for p in rows.prompts]
            assert rows.weights.tolist() == pytest.approx(weights)
            assert rows.noise.shape == rows.latents.shape
            for latents, prompt in zip(rows.latents, rows.prompts, strict=True):
                assert torch.equal(latents, examples[prompt].latents[0])
            noise += [n.flatten()[:8] for n in rows.noise]
            times += rows.timesteps.tolist()
        drawn += prompts
    assert set(drawn) == set(examples)
    noise = torch.stack(noise)
    assert len(noise.unique(dim=0)) == len(noise) == 96
    assert abs(float(noise.mean())) < 0.15 and abs(float(noise.std()) - 1) < 0.15
    spread = sorted(times)
    assert 0 <= spread[0] < timesteps / 16 and timesteps * 15 / 16 <= spread[-1] < timesteps
    assert max(b - a for a, b in itertools.pairwise(spread)) < max(2.7 * timesteps / 96, 2)
    other = run(1)
    assert torch.isin(torch.cat([r.noise.flatten() for p in other for r in p]), noise).float().mean() < 0.01
    assert sorted(t for p in other for r in p for t in r.timesteps.tolist()) != spread
    again = run(0)[-1]
    assert all(torch.equal(a.noise, b.noise) for a, b in zip(again, steps[-1], strict=True))
    assert len(step_rows(pictures(priors=False), network, Settings(), 0)[0].prompts) == 1


def test_a_lora_begins_as_nothing_with_a_spread_that_its_seed_decides():
    shapes = {"wide": (3, 400), "narrow": (5, 25)}
    trained, same, other = (TrainedLoRA(shapes, 8, seed) for seed in (0, 0, 1))
    for name, (_, columns) in shapes.items():
        down, bound = trained.down[name].detach(), columns**-0.5
        assert not trained.up[name].any()
        assert 0.95 * bound < float(down.abs().max()) <= bound and float(down.min()) < -0.9 * bound
        assert abs(float(down.mean())) < 0.2 * bound
        assert torch.equal(down, same.down[name]) and torch.isin(down, other.down[name]).float().mean() < 0.01


def test_factors_are_copies_and_go_on_as_they_were_at_any_scale():
    settings = Settings(steps=4, rank=2, learning_rate=1e-2)
    trained = started(settings)
    kept = trained.factors()
    products = {n: f.up @ f.down for n, f in kept.items()}
    train(trained, Network(), pictures(), settings)
    assert all(torch.equal(f.up @ f.down, products[n]) for n, f in kept.items()), "a copy changed with training"
    assert not any(
        torch.equal(f.up, kept[n].up) or torch.equal(f.down, kept[n].down) for n, f in trained.factors().items()
    )
    again = TrainedLoRA(SHAPES, 2, 9)
    again.load({n: Factors(f.up * 2, f.down, 0.5) for n, f in kept.items()})
    for name, f in again.factors().items():
        assert f.scale == 1 and torch.equal(f.up, kept[name].up) and torch.equal(f.down, kept[name].down)


@pytest.mark.parametrize("change", ["rank", "missing", "more"])
def test_another_loras_layers_or_rank_do_not_fit(change):
    factors = TrainedLoRA(SHAPES, 3 if change == "rank" else 2, 0).factors()
    if change == "missing":
        del factors["b"]
    elif change == "more":
        factors["c"] = factors["b"]
    with pytest.raises(ValueError, match=r"has \d layers of rank \d; expected the 2 layers"):
        TrainedLoRA(SHAPES, 2, 0).load(factors)


@pytest.mark.parametrize(
    "bad", [{"steps": 0}, {"learning_rate": 0.0}, {"rank": 0}, {"batch_size": 0}, {"prior_weight": -0.5}, {"seed": -1}]
)
def test_settings_out_of_range_are_named(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} is "):
        Settings(**bad)
