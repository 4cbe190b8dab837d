"""What a prompt's words say to a LoRA, against dense algebra, a closed form and a LoRA that one step has trained."""

from __future__ import annotations

import math

import pytest
import torch

from ziplora_core import words
from ziplora_core.lora_set import Factors

WIDTH, TOKENS = 12, 5


def lora(seed: int, rank: int = 3, scale: float = 1.0) -> Factors:
    g = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(7, rank, generator=g), torch.randn(rank, WIDTH, generator=g), scale)


def prompt(seed: int, tokens: int = TOKENS) -> torch.Tensor:
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def test_answers_are_those_of_the_dense_update() -> None:
    layers, empty = [lora(1), lora(2, rank=1)], prompt(9)
    said = [prompt(3), prompt(4)]
    expected = []
    for p in said:
        found = []
        for factors in layers:
            dense = (factors.up.double() @ factors.down.double()).numpy()
            d = (p - empty).double().numpy()
            ratio = math.sqrt(((d @ dense.T) ** 2).sum() / (d**2).sum() / (dense**2).sum())
            found.append(ratio * math.sqrt(WIDTH))
        expected.append(sum(found) / 2)
    assert words.responses(layers, said, empty) == pytest.approx(expected, rel=1e-5)


def test_numbers_at_random_are_answered_by_one() -> None:
    """Over an orthonormal basis the mean square is exactly one: ‖ΔW‖² is the sum over its directions."""
    basis = torch.linalg.qr(prompt(5, WIDTH))[0]
    found = words.responses([lora(1)], [row[None] for row in basis], torch.zeros(1, WIDTH))
    assert sum(r * r for r in found) / WIDTH == pytest.approx(1, rel=1e-5)


def test_one_direction_is_answered_by_all_or_nothing() -> None:
    down = torch.zeros(1, WIDTH)
    down[0, 3] = 2.0
    along, across = torch.zeros(1, WIDTH), torch.zeros(1, WIDTH)
    along[0, 3], across[0, 4] = 5.0, 5.0
    found = words.responses([Factors(torch.ones(7, 1), down)], [along, across], torch.zeros(1, WIDTH))
    assert found == pytest.approx([math.sqrt(WIDTH), 0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_strength_and_size_change_nothing(dtype) -> None:
    one, said, empty = lora(1), [prompt(3).to(dtype)], prompt(9).to(dtype)
    twice = Factors(2 * one.up, one.down, -3.0)
    assert words.responses([twice], said, empty) == pytest.approx(words.responses([one], said, empty), rel=1e-5)


def test_zeros_say_nothing_and_hear_nothing() -> None:
    zero = Factors(torch.zeros(7, 2), torch.ones(2, WIDTH))
    assert words.responses([zero], [prompt(3)], prompt(9)) == [0.0]
    assert words.responses([lora(1)], [prompt(9)], prompt(9)) == [0.0], "a prompt that says what the empty one says"
    assert words.responses([zero, lora(1)], [prompt(3)], prompt(9)) == words.responses(
        [lora(1)], [prompt(3)], prompt(9)
    )
    mute = words.measure([lora(1)], "content", {"content": prompt(3)}, [prompt(9)], prompt(9))
    assert math.isnan(mute.over_ordinary) and not mute.speaks, "ordinary prompts that say nothing are no measure"
    assert words.measure([lora(1)], "content", {"content": prompt(3)}, [], prompt(9)).speaks is False


def test_of_layers_that_hear_nothing_no_words_are_known() -> None:
    """All zero, or of another width than the prompts: nothing is said of them, and one that hears is enough."""
    zero = Factors(torch.zeros(7, 2), torch.ones(2, WIDTH))
    other = Factors(torch.ones(7, 1), torch.ones(1, WIDTH + 1))
    given = "content", {"content": prompt(3), "style": prompt(4)}, [prompt(5)], prompt(9)
    assert words.measure([zero], *given) is None
    assert words.measure([other], *given) is None
    assert words.measure([zero, other, lora(1)], *given) == words.measure([lora(1)], *given) is not None


def test_an_update_kept_whole_is_the_same_update(monkeypatch) -> None:
    """`up` a unit matrix, as of updates that are no low-rank product: the same numbers, without a product with it."""
    factors, said, empty = lora(1), [prompt(3), prompt(4)], prompt(9)
    whole = Factors(torch.eye(7), factors.up @ factors.down)
    assert words.responses([whole], said, empty) == pytest.approx(words.responses([factors], said, empty), rel=1e-5)
    monkeypatch.setattr(words, "_size", lambda *_: pytest.fail("a product with a unit matrix"))
    words.responses([whole], said, empty)
    nearly = torch.eye(7)
    nearly[3, 2] = 0.5
    monkeypatch.undo()
    dense = Factors(torch.eye(7), nearly @ factors.up @ factors.down)
    square = Factors(nearly, factors.up @ factors.down)
    assert words.responses([square], said, empty) == pytest.approx(words.responses([dense], said, empty), rel=1e-5)


def test_an_interrupt_ends_it_between_layers() -> None:
    """What the callback raises passes through, before the next layer is looked at."""
    seen = []

    def layers():
        for seed in range(9):
            seen.append(seed)
            yield lora(seed)

    def stop() -> None:
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        words.responses(layers(), [prompt(3)], prompt(9), stop)
    assert len(seen) == 3


def test_layers_of_another_width_and_convolutions_are_left_out() -> None:
    other = Factors(torch.ones(7, 1), torch.ones(1, WIDTH + 1))
    convolution = Factors(torch.ones(7, 1), torch.ones(1, WIDTH, 3, 3))
    assert words.responses([other, lora(1), convolution], [prompt(3)], prompt(9)) == words.responses(
        [lora(1)], [prompt(3)], prompt(9)
    )
    assert words.responses([other], [prompt(3)], prompt(9)) == [0.0]


@pytest.mark.parametrize("tokens", [2 * TOKENS, 2 * TOKENS - 3])
def test_a_longer_prompt_is_measured_against_the_empty_one_repeated(tokens: int) -> None:
    long, empty = prompt(3, tokens), prompt(9)
    whole = torch.cat([empty, empty])[:tokens]
    assert words.responses([lora(1)], [long], empty) == words.responses([lora(1)], [long], whole)


def trained(said: torch.Tensor, empty: torch.Tensor, seed: int) -> Factors:
    """The first step of a LoRA that learns an output for a prompt, by autograd: down at random, up zero before it."""
    g = torch.Generator().manual_seed(seed)
    up = torch.zeros(7, 8, requires_grad=True)
    down = torch.randn(8, WIDTH, generator=g) / math.sqrt(WIDTH)
    wanted = torch.randn(len(said), 7, generator=g)
    ((said - empty) @ down.T @ up.T - wanted).square().sum().backward()
    return Factors(-0.01 * up.grad, down)


def test_a_lora_answers_most_to_the_words_that_it_learned_from() -> None:
    """Of two LoRAs, each to its own prompt, and they are seen to be swapped where they are."""
    empty, ordinary = prompt(9), [prompt(20 + i) for i in range(4)]
    said = {"content": prompt(3), "style": prompt(4)}
    loras = {concept: trained(words_, empty, 30 + i) for i, (concept, words_) in enumerate(said.items())}
    right = {c: words.measure([loras[c]], c, said, ordinary, empty) for c in said}
    assert all(effect.speaks for effect in right.values()) and not words.swapped(right)
    other = {"content": said["style"], "style": said["content"]}
    wrong = {c: words.measure([loras[c]], c, other, ordinary, empty) for c in said}
    assert not any(effect.speaks for effect in wrong.values()) and words.swapped(wrong)
    assert wrong["content"].others == {"style": pytest.approx(right["content"].own)}
    one_wrong = {"content": right["content"], "style": wrong["style"]}
    assert not words.swapped(one_wrong) and not words.swapped({"content": wrong["content"]})
