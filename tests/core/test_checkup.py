"""Verdicts before a zip, from figures that are written down: each says what they say, and hides what is worthless."""

from __future__ import annotations

import math

import pytest

from ziplora_core.checkup import ENOUGH, Effect, after_zip, find
from ziplora_core.prompts import PromptEffect
from ziplora_core.words import WordEffect

HEARD, DEAF = WordEffect(2.0, {}, (1.0, 1.2)), WordEffect(1.1, {}, (1.0, 1.2))
TURNED = {"content": WordEffect(1.0, {"style": 2.0}, (1.2,)), "style": WordEffect(0.8, {"content": 1.9}, (1.2,))}


def effect(
    own: float = 0.3, empty: float = 0.1, spoiled: float = 0.0, words: WordEffect | None = HEARD, **other
) -> Effect:
    return Effect({"own": own, "empty": empty, **other}, spoiled, words)


def test_good_ones_are_warned_of_nothing() -> None:
    found = find({"content": effect(), "style": effect()})
    assert found.good and found.enough
    assert find({"content": effect(spoiled=ENOUGH + 0.01), "style": effect()}).enough is False
    assert find({"content": effect(spoiled=ENOUGH), "style": effect()}).enough is True
    assert find({"content": effect(spoiled=ENOUGH + 0.01), "style": effect(spoiled=ENOUGH)}).spoiled == ("content",)


def test_what_does_nothing_is_idle_and_not_asleep() -> None:
    found = find({"content": effect(own=0.0, empty=0.0, words=DEAF), "style": effect(own=0.009)})
    assert found.idle == ("content", "style") and not found.asleep and not found.swapped and not found.good
    found = find({"content": effect(own=0.0, empty=0.0, words=DEAF), "style": effect(own=0.2, empty=0.2, words=DEAF)})
    assert (found.idle, found.asleep) == (("content",), ("style",))
    assert find({"content": effect(own=0.005, empty=0.1, words=DEAF)}).asleep == ()


def test_what_no_prompt_can_wake_is_told_from_what_this_one_does_not() -> None:
    """A strength of 0 or a file of zeros changes nothing at all; a wrong prompt may change a little, or do without."""
    found = find({"content": effect(own=0.0, empty=0.0), "style": effect(own=0.004, empty=0.0)})
    assert (found.idle, found.silent) == (("content", "style"), ("content",))
    assert find({"content": effect(own=0.0, empty=0.3)}).silent == ()
    assert find({"content": effect(own=0.0, empty=math.nan)}).silent == ()


def test_either_words_or_passes_are_enough_to_be_awake() -> None:
    alike = {"own": 0.2, "empty": 0.2}
    assert find({"content": Effect(alike, 0.0, HEARD)}).good, "its words speak to it"
    assert find({"content": effect(0.4, 0.2, words=DEAF)}).good, "it does twice as much with them"
    assert find({"content": Effect(alike, 0.0, DEAF)}).asleep == ("content",)


def test_where_no_layer_reads_the_prompt_passes_decide() -> None:
    assert find({"content": effect(0.25, 0.2, words=None)}).good
    assert find({"content": effect(0.21, 0.2, words=None)}).asleep == ("content",)
    two = {"content": effect(0.25, 0.2, words=None), "style": effect()}
    assert find(two).unheard == ("content",) and find(two).good, "nothing is found wrong, and all is not known well"
    assert find({"content": effect(0.21, 0.2, words=None)}).unheard == ()
    assert find({"content": effect(0.0, 0.0, words=None)}).unheard == ()
    turned = {"content": effect(0.1, 0.1, words=None, other=0.3), "style": effect(0.2, 0.2, words=None, other=0.3)}
    assert find(turned).swapped
    turned["style"] = effect(0.2, 0.2, words=None, other=0.2)
    assert not find(turned).swapped and find(turned).asleep == ("content", "style")


def test_swapped_prompts_hide_that_they_wake_nothing() -> None:
    found = find({c: effect(0.1, 0.1, words=words) for c, words in TURNED.items()})
    assert found.swapped and not found.asleep and not found.good
    three = {**{c: effect(words=words) for c, words in TURNED.items()}, "other": effect()}
    assert not find(three).swapped, "of three nobody can say whose prompt is whose"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_wake_nothing(bad: float) -> None:
    assert math.isnan(effect(own=bad, words=DEAF).more)
    assert not effect(own=bad, words=DEAF).woken and not effect(own=bad).idle
    assert effect(empty=0.0, words=DEAF).woken, "it does something with its prompt, and nothing without"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_spoiled_by_no_number_is_not_enough(bad: float) -> None:
    assert not effect(spoiled=bad).finite and not effect(empty=bad).finite and effect().finite
    assert find({"content": effect(spoiled=bad), "style": effect()}).spoiled == ("content",)


def test_after_a_zip_either_words_or_passes_are_enough_and_words_tell_swapped_prompts() -> None:
    def gained(own: float, **other: float) -> PromptEffect:
        return PromptEffect({}, {"own": own, "empty": 0.1, **other})

    woken, not_woken, by_other = gained(0.9), gained(0.1), gained(0.1, other=0.9)
    assert after_zip({"content": woken, "style": not_woken}, {}).asleep == ("style",)
    assert after_zip({"content": woken, "style": not_woken}, {"content": DEAF, "style": HEARD}).good
    assert after_zip({"content": not_woken, "style": not_woken}, {"content": HEARD}).asleep == ("style",)
    turned = after_zip({"content": by_other, "style": by_other}, {})
    assert turned.swapped and not turned.asleep
    assert not after_zip({"content": by_other, "style": by_other}, {"content": HEARD, "style": HEARD}).swapped
    assert after_zip({"content": by_other, "style": by_other}, {"content": HEARD}).swapped
    assert after_zip({"content": woken, "style": woken}, TURNED).swapped
    assert after_zip({}, {}).good
