"""Both worlds answer the same questions: true pictures of what is asked for, and whether drawn ones are right."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_art import toy_atlas

from demo.art import atlas, concepts, judge, scenes, subjects
from demo.manifest import Asked, Manifest, read_manifest, write_manifest
from demo.scores import Question, Score, base_questions, score
from demo.truth import Truth, open_truth, rights, shares


@pytest.fixture(scope="module")
def art(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """A manifest of the second world, as its gates write it, with an untrained judge and drawings of ellipses."""
    folder = tmp_path_factory.mktemp("art")
    world = scenes.World(toy_atlas())
    entries = {concept.name: concepts.describe(concept, {}) for concept in concepts.concepts(world)}
    write_manifest(folder / "world.json", concepts.about(world, list(entries), {}), entries)
    (folder / "weights").mkdir()
    judge.save(judge.Judge(), folder / "weights" / "judge.safetensors")
    atlas.write_part(world.atlas, concepts.drawings(world), folder / "drawings.safetensors")
    return read_manifest(folder)


@pytest.fixture(scope="module", params=["shapes", "art"])
def world(request: pytest.FixtureRequest) -> Manifest:
    found: Manifest = read_manifest() if request.param == "shapes" else request.getfixturevalue("art")
    assert found.world == request.param
    return found


@pytest.fixture(scope="module")
def truth(world: Manifest) -> Truth:
    return open_truth(world)


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


def test_the_second_world_knows_its_design_from_another_drawing(art: Manifest) -> None:
    truth = open_truth(art)
    name = art.subjects[0].name
    assert truth.same(name, Asked("", name, "hatching"))
    assert not truth.same(f"{judge.ANOTHER}{name}", Asked("", name, "hatching"))
    assert truth.same(f"{judge.ANOTHER}{name}", Asked("", name, "streamline")), "the set's own drawing is another one"


def test_a_design_comes_before_its_kind(art: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    truth: Any = open_truth(art)
    name = next(iter(subjects.DESIGNS))
    said = {
        "design": [name, judge.ANOTHER + name, judge.OTHER],
        "subject": [name, name, "cat"],
        "style": ["noto"] * 3,
        "place": ["left"] * 3,
    }
    monkeypatch.setattr(truth.judge, "answers", lambda pictures: dict(said))
    assert truth.answers(torch.zeros(3, 3, 8, 8))["subject"] == [name, judge.ANOTHER + name, "cat"]


def test_true_pictures_of_the_first_world_are_called_right() -> None:
    world = read_manifest()
    truth = open_truth(world)
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
        write_manifest(tmp_path / "world.json", {"world": object()}, {})
    assert not list(tmp_path.glob("world.json"))
    write_manifest(tmp_path / "world.json", {"world": "art"}, {})
    assert json.loads((tmp_path / "world.json").read_text(encoding="utf-8")) == {"world": "art", "loras": {}}
