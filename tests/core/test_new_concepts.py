"""Blocks of concepts that no choice has seen: what they are made of, without training anything."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from toy_world import toy_atlas

from benchmarks import new_concepts
from demo.world import concepts, scenes, sets, subjects, techniques
from demo.world.techniques import Layers


@pytest.fixture(scope="module")
def world() -> scenes.World:
    return scenes.World(toy_atlas())


def drawn(style: techniques.Technique) -> torch.Tensor:
    side = torch.linspace(-1, 1, 128)
    alpha = (side.view(-1, 1).abs() + side.abs() < 1).float()[None, None]
    own, ground = (torch.tensor(color).view(1, 3, 1, 1) for color in ((0.9, 0.5, 0.2), (0.6, 0.8, 1.0)))
    return style(Layers(own * alpha + ground * (1 - alpha), alpha, ground))


def test_no_subject_is_in_two_blocks_and_the_base_saw_none(world: scenes.World) -> None:
    taught = [new_concepts.designs(block, world) for block in new_concepts.BLOCKS]
    usable = [s for s, word in world.held_out if s not in subjects.DESIGNS and not sets.SETS[word].one_color]
    assert sum(map(len, taught)) == min(len(usable), len(taught) * new_concepts.SUBJECTS) > 12
    for one, other in combinations([subjects.DESIGNS, *taught], 2):
        assert not set(one) & set(other)
    for one in taught:
        assert set(one.items()) <= world.held_out
        assert not any(sets.SETS[word].one_color for word in one.values()), "they are drawn in no technique"


def test_styles_are_the_same_in_every_run_and_others_in_every_block() -> None:
    first, again = (new_concepts.styles("choose") for _ in range(2))
    assert list(first) == list(again) == new_concepts.STYLE_NAMES
    for name in first:
        picture = drawn(first[name])
        assert picture.shape == (1, 3, 128, 128) and 0 <= picture.min() and picture.max() <= 1
        assert picture.equal(drawn(again[name]))
        others = [drawn(new_concepts.styles(block)[name]) for block in new_concepts.BLOCKS[1:]]
        assert all(float((picture - other).abs().mean()) > 0.02 for other in others)


def test_a_block_is_known_where_it_is_entered(world: scenes.World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(techniques, "TECHNIQUES", techniques.TECHNIQUES.copy())
    monkeypatch.setattr(scenes, "TECHNIQUES", techniques.TECHNIQUES)
    chosen = new_concepts.choice("confirm", world)
    scene = scenes.Scene(next(iter(chosen.designs)), next(iter(chosen.designs.values())), chosen.styles[0], "blue")
    with pytest.raises(KeyError):
        scenes.render(world.atlas, [scene])
    new_concepts.enter("confirm")
    assert scenes.render(world.atlas, [scene]).shape == (1, 3, 128, 128)
    with pytest.raises(ValueError, match="is no block"):
        new_concepts.enter("another")


def test_a_blocks_loras_are_taught_its_concepts(world: scenes.World, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = new_concepts.choice("final", world)
    taught = concepts.concepts(world, chosen)
    assert [c.name for c in taught] == [*chosen.designs, *chosen.styles]
    assert all({s.set for s in c.scenes} == {chosen.designs[c.name]} for c in taught if c.kind == "content")
    assert {c.name for c in taught}.isdisjoint(c.name for c in concepts.concepts(world))
