"""The loop around the objective: learns, repeats, stops, and leaves by every door."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from toys import SHAPES, Dense, ToyPredictor, factors, of_two, toy_pair, toy_references

from ziplora_core.branch import JoinedSet
from ziplora_core.coefficients import Coefficients
from ziplora_core.draws import training_batches
from ziplora_core.gradient import optimize
from ziplora_core.lora_set import CONCEPTS, LoRASet
from ziplora_core.objective import PAPER
from ziplora_core.retention import measure_retention
from ziplora_core.solver import SOLVERS, NotFinite, Settings
from ziplora_core.zipper import solve


def run(settings=None, predictor=None, pair=None, references=None, on_step=None):
    joined = JoinedSet(pair or toy_pair(), dtype=torch.float64)
    return optimize(
        joined, predictor or ToyPredictor(), references or toy_references(), settings or Settings(), on_step
    )


@pytest.mark.slow
def test_learns_on_noise_it_never_saw():
    joined, predictor, references = JoinedSet(toy_pair(), dtype=torch.float64), ToyPredictor(), toy_references()
    settings = Settings(steps=25, learning_rate=0.03, similarity_lambda=0.0)
    result = optimize(joined, predictor, references, settings)
    ones = Coefficients.ones(joined.loras)
    before, after = measure_retention(joined, predictor, references, [ones, result.coefficients], seed=0)
    assert after["content"] + after["style"] < 0.8 * (before["content"] + before["style"])


def test_same_seed_same_bits_and_another_seed_another_answer():
    a, b, c = run(Settings(steps=5)), run(Settings(steps=5)), run(Settings(steps=5, seed=1))
    assert all(torch.equal(a.coefficients["style"][k], b.coefficients["style"][k]) for k in a.coefficients["style"])
    assert not all(torch.equal(a.coefficients["style"][k], c.coefficients["style"][k]) for k in a.coefficients["style"])


def test_timesteps_of_few_steps_are_spread_over_the_schedule():
    predictor, settings = ToyPredictor(), Settings(batch_size=2)
    batches = itertools.islice(training_batches(toy_references(), predictor, settings), 8)
    rows = [(int(t), int(c)) for (b,) in batches for t, c in zip(b.timesteps, b.concept_index, strict=True)]
    for concept in (0, 1):
        eighths = {t * 8 // predictor.timesteps for t, of in rows if of == concept}
        assert len(eighths) == 8  # sixteen independent draws would leave one empty in two of three runs


def test_from_a_start_the_result_is_the_mean_of_the_last_half(monkeypatch):
    monkeypatch.setattr("ziplora_core.gradient._BETAS_FROM_START", (0.9, 0.999))  # as from ones, to compare with
    joined, predictor, references = JoinedSet(toy_pair(), dtype=torch.float64), ToyPredictor(), toy_references()
    start = Coefficients.ones(joined.loras)

    def last(steps, start=None):
        found = optimize(joined, predictor, references, Settings(steps=steps, objective=PAPER), start=start)
        return joined.flatten(found.coefficients)

    expected = torch.stack([last(steps) for steps in (4, 5, 6)]).mean(0)
    torch.testing.assert_close(last(6, start), expected)
    assert not torch.allclose(last(6, start), last(6))


def test_two_passes_a_step_when_batched_and_four_when_not():
    for joins, passes in ((True, 2), (False, 4)):
        predictor = ToyPredictor(joins)
        run(Settings(steps=3, objective=PAPER), predictor)
        assert predictor.calls == 3 * passes


def test_batched_or_not_is_the_same_run():
    a, b = run(Settings(steps=5), ToyPredictor(True)), run(Settings(steps=5), ToyPredictor(False))
    for side in ("content", "style"):
        for name, m in a.coefficients[side].items():
            torch.testing.assert_close(m, b.coefficients[side][name], rtol=1e-5, atol=1e-6)


def test_relative_losses_begin_at_one():
    """Whatever the LoRAs' strengths and the network's scale, a relative retention is about one at the direct merge."""
    still = Settings(steps=40, learning_rate=1e-8)
    for gain in (1.0, 100.0):

        class Loud(ToyPredictor):
            def __call__(self, batch, branch, gain=gain):
                return gain * super().__call__(batch, branch)

        history = run(still, Loud()).history
        for concept in ("content", "style"):
            mean = sum(s.losses.retention[concept] for s in history) / len(history)
            assert 0.5 < mean < 2.0
        assert history[0].losses.overlap == pytest.approx(100)


@pytest.mark.parametrize("solver", [solver for solver in SOLVERS if solver != "fusion"])
def test_every_solver_of_coefficients_beats_the_direct_merge(solver):
    joined, predictor, references = JoinedSet(toy_pair(), dtype=torch.float64), ToyPredictor(), toy_references()
    result = solve(joined, predictor, references, Settings(solver=solver))
    ones = Coefficients.ones(joined.loras)
    before, after = measure_retention(joined, predictor, references, [ones, result.coefficients], seed=0)
    assert after["content"] + after["style"] < 0.9 * (before["content"] + before["style"])
    assert len(result.history) == (0 if solver == "layerwise" else Settings.steps)
    assert set(result.relative_error) == (set() if solver == "gradient" else set(SHAPES))
    assert all(left == 1 if name.startswith("only") else 0 <= left < 1 for name, left in result.relative_error.items())
    none = solve(joined, predictor, references, Settings(steps=0, solver=solver))
    assert all(torch.equal(m, torch.ones_like(m)) for m in none.coefficients["content"].values())


def test_references_of_different_sizes():
    g = torch.Generator().manual_seed(0)
    references = of_two(torch.randn(1, 3, 4, 6, generator=g), torch.randn(1, 3, 8, 8, generator=g))
    result = run(Settings(steps=2), references=references)
    assert len(result.history) == 2 and all(math.isfinite(s.losses.total) for s in result.history)


def test_no_steps_is_the_direct_merge():
    predictor = ToyPredictor()
    result = run(Settings(steps=0), predictor)
    assert predictor.calls == 0 and result.history == []
    assert all(torch.equal(m, torch.ones_like(m)) for m in result.coefficients["content"].values())


def test_first_update_moves_by_the_rate():
    """Adam's first step is sign(gradient) · rate: where the community's 5e-5 comes to nothing."""
    for rate in (0.01, 5e-5):
        moved = [(m - 1).abs() for m in run(Settings(steps=1, learning_rate=rate)).coefficients["style"].values()]
        assert torch.cat(moved).max().item() == pytest.approx(rate, rel=1e-2)


def test_stops_when_the_overlap_vanishes():
    """Overlap alone drives both coefficients of a column to zero together, and the run ends there."""
    pair = LoRASet(CONCEPTS, {"only": of_two(factors((3, 4), 1, 0, 0.0), factors((3, 4), 1, 1, 0.0))})

    class Still(ToyPredictor):
        def __call__(self, batch, branch):
            x = batch.latents[:, :, 0, 0].double().expand(-1, 4)
            return branch.layer("only", x, Dense(torch.zeros(3, 4, dtype=torch.float64)))

    references = of_two(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))
    result = run(Settings(steps=50, learning_rate=1.0), Still(), pair, references)
    assert result.stopped == "the overlap reached zero"
    assert len(result.history) < 50 and result.coefficients.overlap() < 1e-4


def test_interrupt_leaves_at_once():
    class Interrupt(Exception):
        pass

    seen = []

    def on_step(step):
        seen.append(step.index)
        if step.index == 2:
            raise Interrupt

    with pytest.raises(Interrupt):
        run(on_step=on_step)
    assert seen == [1, 2]


def test_a_loss_that_is_not_finite_names_its_step():
    class Broken(ToyPredictor):
        def __call__(self, batch, branch):
            y = super().__call__(batch, branch)
            return y * float("nan") if self.calls > 3 else y

    with pytest.raises(
        NotFinite, match="step 2: the loss is not finite.*layer '.*' had changed most, by 0.01"
    ) as caught:
        run(Settings(objective=PAPER), predictor=Broken())
    kept, ones = caught.value.kept, Coefficients.ones(toy_pair())
    assert (caught.value.step, len(kept.history)) == (2, 1)
    assert caught.value.layer in SHAPES
    assert kept.coefficients.most_changed(ones) == ("", "", 0.0), "those of step 1, which step 1's update then changed"


def test_a_loss_that_is_not_finite_keeps_the_coefficients_of_the_last_that_was():
    class Breaking(ToyPredictor):
        def __call__(self, batch, branch):
            y = super().__call__(batch, branch)
            return y * float("inf") if self.calls > 6 else y

    settings = Settings(objective=PAPER, learning_rate=0.1)
    with pytest.raises(NotFinite, match="step 4") as caught:
        run(settings, predictor=Breaking())
    seen = run(dataclasses.replace(settings, steps=2)).coefficients
    kept = caught.value.kept.coefficients
    assert all(torch.equal(kept["style"][k], seen["style"][k]) for k in seen["style"])
    assert "step 4" in caught.value.kept.stopped


def test_nothing_is_kept_where_the_first_loss_is_not_finite():
    class Broken(ToyPredictor):
        def __call__(self, batch, branch):
            return super().__call__(batch, branch) * float("nan")

    with pytest.raises(NotFinite, match="step 1.*no coefficient had changed yet") as caught:
        run(Settings(objective=PAPER), predictor=Broken())
    assert caught.value.kept is None and caught.value.layer == ""


def test_overflow_of_the_scaled_gradient_is_survived():
    class Half(ToyPredictor):
        loss_scale = 1e300

    scaled = run(Settings(steps=4), Half())
    plain = run(Settings(steps=4))
    assert len(scaled.history) == len(plain.history) == 4


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": -1},
        {"steps": 10_001},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"learning_rate": math.inf},
        {"similarity_lambda": -0.1},
        {"batch_size": 0},
        {"seed": -1},
        {"solver": "magic"},
    ],
)
def test_settings_out_of_range_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Settings(**bad)
