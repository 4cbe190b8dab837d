"""The world's truth: true pictures of what is asked for, and whether drawn ones are right."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_world import toy_atlas

from demo import judge
from demo.manifest import Asked, Manifest, read_manifest, write_manifest
from demo.scores import Question, Score, base_questions, score
from demo.truth import Truth, rights, shares
from demo.world import atlas, concepts, scenes, subjects
from demo.world.sets import SETS


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """A manifest as the gates write it, with an untrained judge and drawings of ellipses."""
    folder = tmp_path_factory.mktemp("world")
    known = scenes.World(toy_atlas())
    entries = {concept.name: concepts.describe(concept, {}) for concept in concepts.concepts(known)}
    write_manifest(folder / "world.json", concepts.about(known, list(entries), {}), entries)
    (folder / "weights").mkdir()
    judge.save(judge.Judge(), folder / "weights" / "judge.safetensors")
    atlas.write_part(known.atlas, concepts.drawings(known), folder / "drawings.safetensors")
    return read_manifest(folder)


@pytest.fixture(scope="module")
def truth(world: Manifest) -> Truth:
    return Truth(world)


def test_every_pair_has_a_true_picture(world: Manifest, truth: Truth) -> None:
    pairs = world.pairs()
    assert len(pairs) == len(world.subjects) * len(world.styles) - len(world.untold)
    for subject, style in pairs[:: max(1, len(pairs) // 6)]:
        assert world.prompt(subject, style) == f"{subject.words} {style.words}"
        pictures = truth.pictures(subject.name, style.name, 1, random.Random(0))
        assert pictures.shape == (1, 3, world.size, world.size) and pictures.std() > 0.02
        for one in (subject, style):
            assert truth.more(one, 2, random.Random(0)).shape == (2, 3, world.size, world.size)


def test_prompts_name_what_they_ask_for(world: Manifest) -> None:
    for subject in world.subjects:
        assert subject.identifier in world.alone(subject).prompt.split()
        assert subject.identifier not in subject.of_class.split()
        asked = world.restyled(subject, world.other_styles[0])
        assert asked == Asked(f"{subject.words} in {asked.style} style", subject.name, world.other_styles[0])
    for number, style in enumerate(world.styles):
        asked = world.on_unseen(style, number)
        assert style.identifier in asked.prompt.split() and asked.style == style.name
        assert asked.subject not in {one.name for one in world.subjects}
        assert len(style.pictures) == len(style.prompts) and style.shows != asked.subject
    assert {*world.shown.pair, *world.shown.whole, world.shown.third} <= set(world.trained())


def test_the_object_is_where_it_is_asked_for(world: Manifest, truth: Truth) -> None:
    subject, style = world.pairs()[0]
    left, right = (
        truth.pictures(subject.name, style.name, 3, random.Random(1), place).mean(0) for place in ("left", "right")
    )
    assert (left - right).abs().mean() > 0.01


def test_a_design_is_known_from_another_drawing(world: Manifest, truth: Truth) -> None:
    name = world.subjects[0].name
    assert truth.same(name, Asked("", name, "chalk"))
    assert not truth.same(f"{judge.ANOTHER}{name}", Asked("", name, "chalk"))
    assert truth.same(f"{judge.ANOTHER}{name}", Asked("", name, "streamline")), "the set's own drawing is another one"


def test_the_bases_own_words_ask_for_no_design(world: Manifest, truth: Truth) -> None:
    """Of a subject that a LoRA teaches one drawing of, the base was shown the others alone."""
    technique = world.other_styles[0]
    asked = [one for one in read_manifest().known if one.subject in world.designs and one.style not in SETS]
    assert asked and all(truth.same(f"{judge.ANOTHER}{one.subject}", one) for one in asked)
    assert not any(truth.same("cat", one) for one in asked)
    taught = world.restyled(world.subjects[0], technique)
    assert not truth.same(f"{judge.ANOTHER}{taught.subject}", taught)


def test_a_design_comes_before_its_kind(world: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    truth: Any = Truth(world)
    name = next(iter(subjects.DESIGNS))
    said = {
        "design": [name, judge.ANOTHER + name, judge.OTHER],
        "subject": [name, name, "cat"],
        "style": ["noto"] * 3,
        "place": ["left"] * 3,
    }
    monkeypatch.setattr(truth.judge, "answers", lambda pictures: dict(said))
    assert truth.answers(torch.zeros(3, 3, 8, 8))["subject"] == [name, judge.ANOTHER + name, "cat"]


def test_true_pictures_are_called_right() -> None:
    world = read_manifest()
    truth = Truth(world)
    subject, style = world.pairs()[3]
    pictures = truth.pictures(subject.name, style.name, 8, random.Random(5))
    right = shares(rights(truth, pictures, [Asked("", subject.name, style.name)] * 8))
    wrong = shares(rights(truth, pictures, [Asked("", world.subjects[-1].name, None)] * 8))
    assert right["both"] >= 0.9 and wrong == {"subject": 0.0, "style": 1.0, "both": 0.0}
    arrays = (pictures.permute(0, 2, 3, 1) * 255).round().byte().numpy()
    assert score(truth, list(arrays), Asked("", subject.name, style.name)).both >= 7


def test_questions_are_as_many_as_asked_for(world: Manifest) -> None:
    assert sum(question.count for question in base_questions(world, 40)) == 40
    assert base_questions(world, 2) == [Question(asked, 1) for asked in world.known[:2]]
    assert (Score(1, 2, 1, 4) + Score(1, 0, 0, 4)).share("subject") == 0.25


def test_a_manifest_is_whole_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_manifest(tmp_path / "world.json", {"size": object()}, {})
    assert not list(tmp_path.glob("world.json"))
    write_manifest(tmp_path / "world.json", {"size": 128}, {})
    assert json.loads((tmp_path / "world.json").read_text(encoding="utf-8")) == {"size": 128, "loras": {}}
