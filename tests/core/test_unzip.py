"""UnZipLoRA's columns, mergers and scores against dense float64 algebra."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ziplora_core import training, unzip

SHAPES = {"a": (12, 20), "b": (10, 16), "own": (8, 10)}
WEIGHTS = {n: torch.randn(s, generator=torch.Generator().manual_seed(i)) for i, (n, s) in enumerate(SHAPES.items())}


ROWS = training.Rows(torch.zeros(1), torch.zeros(1), torch.zeros(1), (0,), torch.ones(1))


class Base:
    def __init__(self, name):
        self.weight = WEIGHTS[name]

    def forward(self, x):
        return x @ self.weight.T

    def backward(self, grad, shape):
        return grad @ self.weight


def made(apart=None, **changes):
    settings = unzip.Settings(**{"steps": 6, "rank": 3, "periods": 3, "share": 0.1, **changes})
    return unzip.UnZip(SHAPES, settings, apart or unzip.Separations(owners={"own": "style"}), WEIGHTS.__getitem__)


def filled(both):
    with torch.no_grad():
        for concept in unzip.CONCEPTS:
            for i, up in enumerate(both.trained[concept].up.values()):
                up.copy_(torch.randn(up.shape, generator=torch.Generator().manual_seed(i + len(concept))))
            for i, m in enumerate(both.mergers[concept].values()):
                m.copy_(torch.rand(m.shape, generator=torch.Generator().manual_seed(i)))
    return both


def dense(both, concept, name):
    trained = both.trained[concept]
    return trained.up[name].double() @ trained.down[name].double()


def test_columns_are_given_out_apart_and_grow():
    both = filled(made())
    seen = []

    def probe():
        both.branch().layer("a", torch.randn(5, 20), Base("a")).square().sum().backward()
        both.branch().layer("b", torch.randn(5, 16), Base("b")).square().sum().backward()

    for step in range(6):
        before = {c: {n: m.clone() for n, m in both.masks[c].items()} for c in unzip.CONCEPTS}
        both.before(step, probe)
        seen.append([int(both.masks[c][n].sum()) for c in unzip.CONCEPTS for n in ("a", "b")])
        for c in unzip.CONCEPTS:
            assert all((both.masks[c][n] >= m).all() for n, m in before[c].items()), "a column was taken away"
            assert all(p.grad is None for p in both.trained[c].parameters())
    each = {"a": 2, "b": 2}  # a tenth of 20 and of 16, rounded
    assert seen == [[period * each[n] for n in ("a", "b")] * 2 for period in (1, 1, 2, 2, 3, 3)]
    for name in ("a", "b"):
        assert not (both.masks["content"][name] & both.masks["style"][name]).any()
    assert "own" not in both.masks["content"] and both.masks["style"]["own"].all()


def test_no_column_is_given_out_by_a_gradient_that_is_not_finite():
    both = filled(made())

    def probe():
        (both.branch().layer("a", torch.randn(5, 20), Base("a")) * float("inf")).square().sum().backward()

    with pytest.raises(FloatingPointError, match="layer a: the gradient by which its columns are given out"):
        both.before(0, probe)
    assert not any(both.masks[c]["a"].any() for c in unzip.CONCEPTS)


def test_a_layer_adds_the_masked_scaled_updates():
    both = filled(made())
    for i, concept in enumerate(unzip.CONCEPTS):
        both.masks[concept]["a"][i::2] = True
    x = torch.randn(2, 4, 20)
    y = both.branch().layer("a", x, Base("a"))
    expected = WEIGHTS["a"].double()
    for concept in unzip.CONCEPTS:
        expected = expected + dense(both, concept, "a") * both.mergers[concept]["a"] * both.masks[concept]["a"]
    torch.testing.assert_close(y.double(), x.double() @ expected.T, rtol=1e-5, atol=1e-5)


def test_prompted_layers_see_their_own_prompt_in_parted_rows():
    contexts = {
        c: torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(i)) for i, c in enumerate(unzip.CONCEPTS)
    }
    both = filled(made(unzip.Separations(contexts, {"b"}, columns=False)))
    x = torch.randn(3, 4, 16)
    parted = expected = x.double() @ WEIGHTS["b"].double().T
    for concept in unzip.CONCEPTS:
        update = dense(both, concept, "b") * both.mergers[concept]["b"]
        expected = expected + x.double() @ update.T
        parted = parted + contexts[concept].double() @ update.T

    def of(prompts):
        rows = None if prompts is None else dataclasses.replace(ROWS, prompts=prompts)
        return both.branch(rows).layer("b", x, Base("b")).double()

    torch.testing.assert_close(of(None), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(of((0, 0, 0)), parted, rtol=1e-5, atol=1e-5)
    mixed = torch.stack([parted[0], expected[1], expected[2]])
    torch.testing.assert_close(of((0, 3, 4)), mixed, rtol=1e-5, atol=1e-5)


def test_rows_as_used():
    """Half parted, half whole, a fifth of each empty."""
    pictures = unzip.rows_as_used(training.Example(torch.zeros(1, 1, 2, 2), 0), 3, 4)
    counts = [[sum(e.prompt == prompt for e in part) / len(part) for prompt in (0, 3, 4)] for part in pictures.sets]
    assert counts == [[0.8, 0, 0.2], [0, 0.8, 0.2]] and not pictures.priors


@pytest.mark.parametrize("seed", range(6))
def test_columns_are_scored_with_three_prompts(seed):
    """Also where a batch of one would have an empty one there."""
    seen = []

    class Watched(Toy):
        def __call__(self, rows, branch):
            seen.append(rows.prompts)
            return super().__call__(rows, branch)

    settings = unzip.Settings(steps=6, rank=3, periods=3, seed=seed)
    both = made(unzip.Separations(), seed=seed)
    pictures = unzip.rows_as_used(training.Example(torch.zeros(1, 4, 3, 2), 0), 3, 4)
    training.train(both, Watched(), pictures, settings)
    assert len(seen) == 9 and [seen[i] for i in (0, 3, 6)] == [(0,)] * 3
    assert {seen[i] for i in (2, 5, 8)} <= {(3,), (4,)}, "every other step is trained as used"


@pytest.mark.parametrize("fresh", [True, False])
def test_score_is_weight_times_what_a_step_does_to_it(fresh):
    """δW by taking the step, small, in float64."""
    both = made(unzip.Separations(columns=False)) if fresh else filled(made(unzip.Separations(columns=False)))
    both.branch().layer("a", torch.randn(5, 20), Base("a")).square().sum().backward()
    trained, m = both.trained["content"], both.mergers["content"]["a"].detach().double()
    up, down, d_up, d_down = (
        t.detach().double() for t in (trained.up["a"], trained.down["a"], trained.up["a"].grad, trained.down["a"].grad)
    )
    rate = 1e-7
    step = ((up - rate * d_up) @ (down - rate * d_down) - up @ down) * m / rate
    expected = ((WEIGHTS["a"].double() + up @ down * m) * step).abs().sum(0)
    found = both.score("content", "a", WEIGHTS["a"])
    assert found.max() > 0
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3 * float(expected.max()))


def test_penalty_is_the_mean_over_layers_of_the_mean_product():
    assert made().penalty() is None, "no column has two owners"
    both = filled(made(unzip.Separations(owners={"own": "style"}, columns=False)))
    means = [(both.mergers["content"][n] * both.mergers["style"][n]).abs().double().mean() for n in ("a", "b")]
    assert both.penalty().item() == pytest.approx(0.5 * float(sum(means).detach()) / 2)


def test_the_pair_and_its_coefficients_are_the_trained_update():
    both = filled(made())
    for i, concept in enumerate(unzip.CONCEPTS):
        both.masks[concept]["a"][i::2] = True
    pair, m = both.pair(), both.coefficients()
    assert "content" not in pair.layers["own"]
    x = torch.randn(4, 20)
    update = sum(f.up @ f.down for _, f in pair.layers["a"].items())
    y = both.branch().layer("a", x, Base("a")) - Base("a").forward(x)
    torch.testing.assert_close(y, x @ update.T, rtol=1e-4, atol=1e-4)
    for c, f in pair.layers["a"].items():
        assert torch.equal(m[c]["a"], (f.down != 0).any(0).float())


def test_goes_on_from_its_pair():
    """What is drawn, whose columns are whose, and what is given out next are as they were."""
    x = {n: torch.randn(5, s[1], generator=torch.Generator().manual_seed(7)) for n, s in SHAPES.items()}

    def probe(both):
        return lambda: sum(both.branch().layer(n, x[n], Base(n)).square().sum() for n in ("a", "b")).backward()

    first = filled(made())
    first.before(0, probe(first))
    with torch.no_grad():
        for c in unzip.CONCEPTS:  # mergers learn in a LoRA's own columns alone
            for name, m in first.mergers[c].items():
                m.masked_fill_(~first.masks[c][name], 1.0)
    pair = first.pair()
    halves = {c: {n: layer[c] for n, layer in pair.layers.items() if c in layer} for c in unzip.CONCEPTS}
    second = made()
    second.load(halves)
    second.before(0, probe(second))  # stopped after columns were given out: nothing more for this period
    for name in SHAPES:
        outputs = [both.branch().layer(name, x[name], Base(name)) for both in (first, second)]
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    for both in (first, second):
        both.before(2, probe(both))
    for c in unzip.CONCEPTS:
        for name, mask in first.masks[c].items():
            assert torch.equal(second.masks[c][name], mask), (c, name)
            free = ~mask
            assert torch.equal(second.trained[c].down[name][:, free], first.trained[c].down[name][:, free])
    with pytest.raises(ValueError, match="rank 3; expected .* of rank 4"):
        made(rank=4).load(halves)


def test_settings_out_of_range_are_named():
    for change in ({"share": 0.2}, {"periods": 0}, {"merger_rate": 0}, {"similarity_lambda": -1}, {"rank": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(change))} is "):
            unzip.Settings(**change)


class Toy:
    """A 'network' of one linear layer that should learn to add a fixed matrix."""

    timesteps, loss_scale = 10, 1.0

    def __init__(self):
        self.wanted = torch.randn(SHAPES["a"], generator=torch.Generator().manual_seed(99)) * 0.1

    def kind(self, prompt):
        return None

    def __call__(self, rows, branch):
        x = rows.noise.flatten(1)[:, :20]
        return branch.layer("a", x, Base("a")), x @ (WEIGHTS["a"] + self.wanted).T


def test_training_gives_out_columns_and_lowers_the_loss():
    toy = Toy()
    both = made(unzip.Separations(), steps=300, learning_rate=1e-2, batch_size=8, rank=8)
    picture = training.Pictures([[training.Example(torch.zeros(1, 4, 3, 2), 0)]])
    history = training.train(both, toy, picture, unzip.Settings(steps=300, learning_rate=1e-2, batch_size=8, rank=8))
    assert [int(m["a"].sum()) for m in both.masks.values()] == [6, 6]
    assert sum(s.loss for s in history[-20:]) < 0.8 * sum(s.loss for s in history[:20])


def test_columns_are_given_out_at_a_smaller_loss_scale_where_the_gradient_overflows():
    """As of a model in fp16: what comes back is infinite above its range."""

    class Half(Toy):
        loss_scale = 1024.0

        def __call__(self, rows, branch):
            y, wanted = super().__call__(rows, branch)
            y.register_hook(lambda gradient: (gradient * 1e4).half().float() / 1e4)
            return y, wanted

    settings = {"steps": 6, "batch_size": 8, "rank": 8}
    both = made(unzip.Separations(), **settings)
    picture = training.Pictures([[training.Example(torch.zeros(1, 4, 3, 2), 0)]])
    history = training.train(both, Half(), picture, unzip.Settings(**settings))
    assert len(history) == 6 and [int(m["a"].sum()) for m in both.masks.values()] == [6, 6]
    with pytest.raises(FloatingPointError, match="columns are given out is not finite, after .* tries at smaller"):
        Half.loss_scale = 1e30
        training.train(made(unzip.Separations(), **settings), Half(), picture, unzip.Settings(**settings))


def test_the_overlap_falls_where_columns_are_shared():
    both = made(unzip.Separations(columns=False), steps=60, learning_rate=1e-2, batch_size=8, rank=8)
    picture = training.Pictures([[training.Example(torch.zeros(1, 4, 3, 2), 0)]])
    history = training.train(both, Toy(), picture, unzip.Settings(steps=60, learning_rate=1e-2, batch_size=8, rank=8))
    assert 0 < history[-1].penalty < history[0].penalty
