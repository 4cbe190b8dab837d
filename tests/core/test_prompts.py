"""Whether a prompt wakes its LoRA, on a layer that can be written out: each LoRA reads one word of the prompt."""

from __future__ import annotations

import math

import pytest
import torch
from torch.overrides import TorchFunctionMode
from toys import Dense, of_two

from ziplora_core import prompts
from ziplora_core.branch import Branch, JoinedSet
from ziplora_core.lora_set import CONCEPTS, Factors, LoRASet
from ziplora_core.solver import OTHER, OWN, Batch, References

LATENT, OUT = 4, 4
WORDS = {"content": LATENT, "style": LATENT + 1}  # the input feature that says a concept's trigger word


def reads(feature: int, seed: int) -> Factors:
    """A LoRA of rank 1 that does something where one input feature is there."""
    g = torch.Generator().manual_seed(seed)
    down = torch.zeros(1, LATENT + 2, dtype=torch.float64)
    down[0, feature] = 1.0
    return Factors(torch.randn(OUT, 1, generator=g, dtype=torch.float64) * 3, down)


class Words:
    """A linear layer on (noisy latent, trigger of content, trigger of style). said: prompt -> which word it holds."""

    timesteps, loss_scale = 1000, 1.0

    def __init__(self, pair: LoRASet, said: dict[str, dict[str, str]], joins: bool = True):
        self.pair, self.said, self.joins, self.calls = pair, said, joins, 0
        g = torch.Generator().manual_seed(3)
        self.weight = torch.randn(OUT, LATENT + 2, generator=g, dtype=torch.float64)
        self.weight[:, LATENT:] = 0  # the bare model knows neither word

    def inputs(self, batch: Batch) -> torch.Tensor:
        noisy = (batch.latents + batch.noise).double().flatten(1)
        words = torch.zeros(len(noisy), 2, dtype=torch.float64)
        for row, place in enumerate(batch.concept_index.tolist()):
            word = self.said[CONCEPTS[place]].get(batch.prompt)
            if word is not None:
                words[row, WORDS[word] - LATENT] = 1
        return torch.cat([noisy, words], 1)

    def __call__(self, batch: Batch, branch: Branch) -> torch.Tensor:
        self.calls += 1
        return branch.layer("layer", self.inputs(batch), Dense(self.weight))

    def target(self, batch: Batch) -> torch.Tensor:
        """What a LoRA that was trained on these references predicts, but for a rest of length 1."""
        rest = torch.zeros(OUT, dtype=torch.float64)
        rest[0] = 1.0
        own = [self.pair.layers["layer"][CONCEPTS[place]] for place in batch.concept_index.tolist()]
        trained = torch.stack([factors.up[:, 0] for factors in own])
        return self.inputs(batch) @ self.weight.T + trained + rest


@pytest.fixture
def pair() -> LoRASet:
    return LoRASet(CONCEPTS, {"layer": of_two(reads(WORDS["content"], 1), reads(WORDS["style"], 2))})


@pytest.fixture
def references() -> References:
    return of_two(torch.randn(2, LATENT, 1, 1), torch.randn(3, LATENT, 1, 1))


RIGHT = {"content": {"own": "content", "other": "style"}, "style": {"own": "style", "other": "content"}}
SWAPPED = {"content": {"own": "style", "other": "content"}, "style": {"own": "content", "other": "style"}}


@pytest.mark.parametrize("joins", [True, False])
def test_right_prompts_are_told_from_an_empty_one(pair, references, joins) -> None:
    predictor = Words(pair, RIGHT, joins)
    found = prompts.measure(JoinedSet(pair, dtype=torch.float64), predictor, references, seed=5)
    for concept, effect in found.items():
        up = pair.layers["layer"][concept].up[:, 0]
        bare = (up + torch.eye(OUT, dtype=torch.float64)[0]).norm()  # the error of the bare model, under any prompt
        assert effect.gain["own"] == pytest.approx(1 - 1 / bare.item(), rel=1e-6)
        assert effect.gain["empty"] == pytest.approx(0, abs=1e-9)
        assert effect.change["empty"] == 0 and effect.change["own"] > 0.1
        assert effect.relative_error() == pytest.approx(1 / bare.item(), rel=1e-6)
        assert effect.fires and not effect.swapped
    assert predictor.calls == 4 * prompts.DRAWS * (1 if joins else 2)


@pytest.mark.parametrize("wrong", [{}, {"own": None}, {"own": "style"}])
def test_a_prompt_without_the_word_does_not_fire_whatever_the_other_does(pair, references, wrong) -> None:
    predictor = Words(pair, {**RIGHT, "content": wrong})
    found = prompts.measure(JoinedSet(pair, dtype=torch.float64), predictor, references, seed=5)
    assert not found["content"].fires and found["style"].fires
    assert predictor.calls == 6 * prompts.DRAWS, "then the other concept's prompt is tried"


@pytest.mark.parametrize(("said", "asked", "passes"), [(RIGHT, True, 6), (SWAPPED, False, 4), (SWAPPED, True, 6)])
def test_the_other_prompt_is_tried_where_it_is_asked_for(pair, references, said, asked, passes) -> None:
    predictor = Words(pair, said)
    joined = JoinedSet(pair, dtype=torch.float64)
    found = prompts.measure(joined, predictor, references, seed=5, other=asked)
    assert predictor.calls == passes * prompts.DRAWS
    assert all((OTHER in effect.change) == asked for effect in found.values())


def test_only_numbers_on_the_cpu_are_made_wider(pair, references) -> None:
    """Apple's GPUs, where the predictions lie, have no float64."""
    on_cpu = set()

    class NoFloat64(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.Tensor.double and id(args[0]) not in on_cpu:
                raise TypeError("Cannot convert a MPS Tensor to float64")
            made = func(*args, **(kwargs or {}))
            if func is torch.Tensor.cpu:
                kept.append(made)
                on_cpu.add(id(made))
            return made

    class OnAGPU(Words):
        def __call__(self, *given):
            with torch._C.DisableTorchFunction():
                return super().__call__(*given)

        def target(self, batch):
            with torch._C.DisableTorchFunction():
                return super().target(batch)

    kept: list[torch.Tensor] = []
    joined = JoinedSet(pair, dtype=torch.float64)
    with NoFloat64():
        found = prompts.measure(joined, OnAGPU(pair, RIGHT), references, seed=5)
    assert kept and found == prompts.measure(joined, Words(pair, RIGHT), references, seed=5)


def test_swapped_prompts_are_seen(pair, references) -> None:
    predictor = Words(pair, SWAPPED)
    found = prompts.measure(JoinedSet(pair, dtype=torch.float64), predictor, references, seed=5)
    assert all(effect.swapped and not effect.fires for effect in found.values())
    assert all(effect.gain[OTHER] > 0.5 > effect.gain[OWN] for effect in found.values())


def test_a_lora_that_acts_on_every_prompt_is_not_said_to_fire(pair, references) -> None:
    always = {**RIGHT, "style": dict.fromkeys(("own", "empty", "other"), "style")}
    found = prompts.measure(JoinedSet(pair, dtype=torch.float64), Words(pair, always), references, seed=5)
    assert found["style"].gain["own"] == pytest.approx(found["style"].gain["empty"]) and not found["style"].fires


def test_numbers_that_are_not_finite_do_not_fire() -> None:
    nan = prompts.PromptEffect({"own": math.nan, "empty": 0.1}, {"own": math.nan, "empty": 0.1})
    assert not nan.fires and not nan.swapped
    assert not prompts.PromptEffect({}, {"own": 0.9, "empty": 1.0}).fires, "nothing is left to gain"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("prompt", ["own", "empty"])
def test_a_gain_that_is_not_finite_wakes_nothing(prompt: str, value: float) -> None:
    effect = prompts.PromptEffect({}, {"own": 0.9, "empty": 0.1, "other": 0.0, prompt: value})
    assert math.isnan(effect.relative_error()) and not effect.fires


@pytest.mark.parametrize("spoiled", ["with the LoRA", "without it"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_draws_no_numbers_under_a_prompt_has_no_gain_there(pair, references, spoiled, value) -> None:
    """An error that is not a number is not an error of nothing."""

    class Spoiled(Words):
        def __call__(self, batch: Batch, branch: Branch) -> torch.Tensor:
            made = super().__call__(batch, branch)
            without = self.calls % 2 == 0
            hit = batch.prompt == OWN and without == (spoiled == "without it")
            return torch.where((batch.concept_index == 1)[:, None], made, made + value) if hit else made

    found = prompts.measure(JoinedSet(pair, dtype=torch.float64), Spoiled(pair, RIGHT), references, seed=5)
    assert math.isnan(found["content"].gain[OWN]) and math.isnan(found["content"].change[OWN])
    assert not found["content"].fires and found["style"].fires
    assert math.isfinite(found["content"].gain["empty"])


def test_where_the_bare_model_does_nothing_there_is_no_change_to_speak_of() -> None:
    zero = {(c, p): torch.zeros(4, dtype=torch.float64) for c in ("content", "style") for p in ("own", "empty")}
    effect = prompts._effects(zero, CONCEPTS, ("own", "empty"))["content"]
    assert effect.change == {"own": 0.0, "empty": 0.0} and effect.gain == {"own": 1.0, "empty": 1.0}
    assert not effect.fires
