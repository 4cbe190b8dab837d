"""K-LoRA's choice against the paper's formulas, written out on whole updates in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from toys import factors, of_two, toy_pair, toy_set

from ziplora_core import k_lora
from ziplora_core.lora_set import CONCEPTS, Factors, LoRASet


def many_layers(count: int = 40, scale: float = 1.0) -> LoRASet:
    """Linear layers and convolutions of unequal sizes and ranks; one LoRA is three times the other, all in all."""
    layers = {}
    for i in range(count):
        shape = (6 + i % 5, 4 + i % 3, *((3, 3) if i % 4 == 0 else ()))
        content = factors(shape, 1 + i % 3, 1000 + i, scale * 3 * (0.3 + (i * 7 % 11) / 5))
        layers[f"layer {i}"] = of_two(content, factors(shape, 2, 2000 + i, 0.3 + (i * 5 % 13) / 5))
    return LoRASet(CONCEPTS, layers)


def transcribed(loras: LoRASet, step: int, steps: int) -> dict[str, str]:
    """The paper, number by number, in Python's own floats."""
    sizes = {}
    for name, layer in loras.layers.items():
        if len(layer) == 2:
            sizes[name] = {
                concept: sorted(
                    abs(f.scale * sum(float(f.up[o, r]) * float(d[r, i]) for r in range(f.rank)))
                    for d in [f.down.flatten(1)]
                    for o in range(len(f.up))
                    for i in range(d.shape[1])
                )[::-1]
                for concept, f in layer.items()
            }
    gamma = sum(sum(s["content"]) for s in sizes.values()) / sum(sum(s["style"]) for s in sizes.values())
    chosen = {}
    for name, of in sizes.items():
        largest = loras.layers[name]["content"].rank * loras.layers[name]["style"].rank
        content, style = (sum(of[concept][:largest]) for concept in ("content", "style"))
        chosen[name] = "content" if content / gamma > style * (1.5 * step / steps + 0.5) else "style"
    return chosen


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_the_choice_is_the_papers(steps: int) -> None:
    for loras in (many_layers(), toy_pair()):
        found, seen = k_lora.scores(loras), set()
        for step in range(steps):
            chosen = found.chosen(k_lora.factor(step / steps))
            assert chosen == transcribed(loras, step, steps)
            seen |= set(chosen.values())
        assert seen == {"content", "style"} or steps == 1


def test_a_layer_where_both_are_equal_is_the_styles() -> None:
    found = k_lora.Scores(1.0, {"less": 0.4, "equal": 0.5, "more": 0.6})
    assert found.chosen(0.5) == {"less": "style", "equal": "style", "more": "content"}


def test_only_layers_that_both_change_are_chosen_for() -> None:
    assert k_lora.scores(toy_pair()).ratios.keys() == {"conv", "first", "second"}


def test_the_style_gains_layers_from_step_to_step_and_loses_none() -> None:
    found = k_lora.scores(many_layers())
    of_style = [{n for n, c in found.chosen(k_lora.factor(t / 20)).items() if c == "style"} for t in range(20)]
    assert all(before <= after for before, after in zip(of_style, of_style[1:], strict=False))
    assert len(of_style[0]) < 10 < 29 < len(of_style[-1])


@pytest.mark.parametrize("strength", [0.01, -3.0])
def test_strengths_do_not_change_the_choice(strength: float) -> None:
    plain, other = k_lora.scores(many_layers()), k_lora.scores(many_layers(scale=strength))
    assert other.gamma == pytest.approx(abs(strength) * plain.gamma)
    assert other.ratios == pytest.approx(plain.ratios)


def in_type(loras: LoRASet, dtype: torch.dtype) -> LoRASet:
    return changed(loras, lambda concept, f: replace(f, up=f.up.to(dtype), down=f.down.to(dtype)))


def changed(loras: LoRASet, change: Callable[[str, Factors], Factors]) -> LoRASet:
    layers = loras.layers.items()
    return replace(loras, layers={name: {c: change(c, f) for c, f in layer.items()} for name, layer in layers})


def test_half_precision_is_computed_in_float32() -> None:
    half = in_type(many_layers(), torch.float16)
    expected = k_lora.scores(in_type(half, torch.float64))
    assert k_lora.scores(half).ratios == pytest.approx(expected.ratios, rel=1e-5)


def test_layers_that_were_never_trained() -> None:
    layers = dict(many_layers(4).layers)

    def nothing(name: str, *concepts: str) -> None:
        layers[name] = {c: replace(f, up=f.up * 0) if c in concepts else f for c, f in layers[name].items()}

    nothing("layer 0", "content")
    nothing("layer 1", "style")
    nothing("layer 2", *CONCEPTS)
    ratios = k_lora.scores(LoRASet(CONCEPTS, layers)).ratios
    assert (ratios["layer 0"], ratios["layer 1"], ratios["layer 2"]) == (0.0, float("inf"), 0.0)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="one content and one style LoRA; found 3: content, style, other"):
        k_lora.scores(toy_set(3))
    apart = {n: layer for n, layer in toy_pair().layers.items() if len(layer) == 1}
    with pytest.raises(ValueError, match="no layer in common"):
        k_lora.scores(LoRASet(CONCEPTS, apart))
    silent = changed(toy_pair(), lambda concept, f: replace(f, scale=f.scale * (concept == "content")))
    with pytest.raises(ValueError, match="the style LoRA changes nothing.*strength may be 0"):
        k_lora.scores(silent)


def test_a_step_lasts_until_the_samplers_next_noise_level() -> None:
    sigmas = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0])
    said = {
        8.0: 0.0, 9.5: 0.0, 8.000001: 0.0, 7.999999: 0.0, 5.0: 0.0, 4.000001: 0.25, 4.0: 0.25, 3.999999: 0.25,
        2.5: 0.25, 2.0: 0.5, 1.0: 0.75, 0.5: 0.75, 0.0: 0.75,
    }  # fmt: skip
    assert {sigma: k_lora.progress(sigma, sigmas) for sigma in said} == said
    assert k_lora.progress(3.0, torch.tensor([3.0, 1.0])) == k_lora.progress(3.0, torch.tensor([3.0])) == 0.0
    many = torch.linspace(1, 0, 1001)  # a thousand steps are a thousand steps
    assert [k_lora.progress(float(s), many) for s in many[:-1]] == [t / 1000 for t in range(1000)]
