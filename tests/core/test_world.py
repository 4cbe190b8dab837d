"""The world's data: scenes, words and techniques, on cut-outs made here instead of the emoji sets."""

from __future__ import annotations

import json
import random
import re

import pytest
import torch
from toy_world import toy_atlas

from demo.world import atlas, scenes, sets, subjects, techniques


@pytest.fixture(scope="module")
def world() -> scenes.World:
    return scenes.World(toy_atlas())


def some(world: scenes.World, count: int, seed: int = 0) -> list[scenes.Scene]:
    rng = random.Random(seed)
    return [world.base_scene(rng) for _ in range(count)]


def test_scenes_and_captions_follow_from_the_seed(world: scenes.World) -> None:
    first, again = some(world, 200), some(world, 200)
    assert first == again and first != some(world, 200, 1)
    said = [scenes.caption(scene, random.Random(3)) for scene in first]
    assert said == [scenes.caption(scene, random.Random(3)) for scene in again]


def test_what_is_held_out_is_never_drawn(world: scenes.World) -> None:
    drawn = some(world, 6000)
    seen = {(scene.subject, scene.set) for scene in drawn}
    assert len(world.held_out) == len(subjects.DESIGNS) + subjects.HELD_OUT_PAIRS
    assert not seen & world.held_out
    assert not {scene.set for scene in drawn} & set(sets.NEW_SETS)
    assert not {scene.technique for scene in drawn} & set(techniques.NEW_TECHNIQUES)
    assert {scene.technique for scene in drawn} == {None, *techniques.BASE_TECHNIQUES}
    # Every subject that lacks a drawing has others, so its word is known.
    assert {subject for subject, _ in world.held_out} <= {subject for subject, _ in seen}


def test_one_color_is_drawn_on_light_grounds_and_in_no_technique(world: scenes.World) -> None:
    black = [scene for scene in some(world, 2000) if sets.SETS[scene.set].one_color]
    assert black
    assert all(scene.ground not in scenes.DARK_GROUNDS and scene.technique is None for scene in black)


def test_a_prompt_reads_as_the_scene() -> None:
    said = scenes.prompt("octopus", "neon", design="noto", place="left", ground="blue")
    assert said == "a noto octopus on the left on a blue ground in neon style"
    assert scenes.prompt("octopus", "noto") == "an octopus in noto style"
    assert scenes.prompt("grapes") == "grapes" and scenes.prompt("unicorn") == "a unicorn"
    assert scenes.prompt(None, place="middle") == "a thing in the middle"


def test_every_word_of_a_caption_is_known_and_fits_one_section(world: scenes.World) -> None:
    from_file = json.loads((sets.DEV.parent / "demo/host_extension/words.json").read_text(encoding="utf-8"))
    assert from_file == scenes.words() and len(set(from_file)) == len(from_file)
    rng = random.Random(1)
    for scene in some(world, 2000):
        words = re.findall(r"[a-z]+", scenes.caption(scene, rng))
        assert set(words) <= set(from_file)
        assert len(words) <= 14  # 16 tokens with start and end
    longest = max((s for s in subjects.ICONS), key=lambda s: len(s.split()))
    full = scenes.prompt(longest, "neon", design="noto", place="left", ground="blue")
    assert len(full.split()) <= 14


def test_captions_tell_the_truth_or_nothing(world: scenes.World) -> None:
    rng = random.Random(2)
    for scene in some(world, 1500):
        words = scenes.caption(scene, rng).split()
        where = {"left", "right", "top", "bottom", "middle"} & set(words)
        assert where <= {scenes.place(scene)}
        assert set(scenes.GROUNDS) & set(words) <= {scene.ground} | set(scene.subject.split())
        assert set(techniques.TECHNIQUES) & set(words) <= {scene.technique}
        assert set(sets.SETS) & set(words) <= {scene.set}


@pytest.mark.parametrize("name", techniques.TECHNIQUES)
def test_a_technique_is_a_rule(world: scenes.World, name: str) -> None:
    """The same picture again, alone or among others; and unlike the plain one."""
    plain = [scenes.Scene(s, "noto", None, "blue", 6.0, -8.0, 90.0, 5.0) for s in ("octopus", "house", "rocket")]
    styled = [scenes.dataclasses.replace(scene, technique=name) for scene in plain]
    mixed = scenes.render(world.atlas, [styled[0], plain[1], styled[2]])
    alone = scenes.render(world.atlas, styled[2:])
    assert mixed.shape == (3, 3, atlas.SIZE, atlas.SIZE)
    assert mixed.min() >= 0 and mixed.max() <= 1 and not mixed.isnan().any()
    torch.testing.assert_close(mixed[2], alone[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(mixed[1], scenes.render(world.atlas, plain[1:2])[0], atol=1e-6, rtol=0)
    assert (alone[0] - scenes.render(world.atlas, plain[2:])[0]).abs().mean() > 0.004


def test_an_object_lies_where_its_scene_says(world: scenes.World) -> None:
    for x, y, name in ((20, 0, "right"), (-20, 2, "left"), (1, 20, "bottom"), (0, -20, "top"), (1, 2, "middle")):
        scene = scenes.Scene("octopus", "noto", None, "white", float(x), float(y), 80.0, 0.0)
        assert scenes.place(scene) == name
        alpha = scenes.compose(world.atlas, [scene]).alpha[0, 0]
        columns = (alpha.sum(0) * torch.arange(atlas.SIZE)).sum() / alpha.sum() - (atlas.SIZE - 1) / 2
        rows = (alpha.sum(1) * torch.arange(atlas.SIZE)).sum() / alpha.sum() - (atlas.SIZE - 1) / 2
        assert abs(float(columns) - x) < 1 and abs(float(rows) - y) < 1
    turned = scenes.Scene("octopus", "noto", None, "white", 0.0, 0.0, 80.0, 90.0)
    alpha = scenes.compose(world.atlas, [turned]).alpha[0, 0] > 0.5
    assert alpha.any(1).sum() > alpha.any(0).sum() * 1.3  # a lying ellipse stands


def test_subjects_have_one_word_each() -> None:
    assert 300 <= len(subjects.ICONS) <= 400
    assert len(set(subjects.ICONS.values())) == len(subjects.ICONS)
    assert set(subjects.DESIGNS) <= set(subjects.ICONS) and set(subjects.DESIGNS.values()) <= set(sets.BASE_SETS)
    assert not set(scenes.IDENTIFIERS) & {w for s in subjects.ICONS for w in s.split()}


def test_an_archive_that_is_not_the_pinned_one_is_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "set.tgz"
    path.write_bytes(b"something else")
    with pytest.raises(sets.ArtError, match="sha512"):
        sets.check(path, sets.SETS["noto"])


def test_share_alike_sets_are_left_out() -> None:
    assert not {"openmoji", "emojione-v1"} & {emoji.name for emoji in sets.SETS.values()}
    assert {emoji.licence for emoji in sets.SETS.values()} == {"Apache-2.0", "MIT", "CC-BY-4.0"}
