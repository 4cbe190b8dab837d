"""What the miniature's trainings, judges and gates are asked, without training anything."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
from toy_world import toy_atlas

from demo import autoencoder, judge
from demo.training import finish, fit_base, gates, latents
from demo.world import concepts, scenes, sets, subjects, techniques


@pytest.fixture(scope="module")
def world() -> scenes.World:
    return scenes.World(toy_atlas())


def test_a_file_of_latents_is_made_from_its_number(world: scenes.World) -> None:
    assert latents.shard_scenes(world, 3) == latents.shard_scenes(world, 3) != latents.shard_scenes(world, 4)


def test_the_hash_says_which_data_and_settings(world: scenes.World) -> None:
    same = latents.digest(world, {"steps": 1})
    assert same == latents.digest(scenes.World(toy_atlas()), {"steps": 1})
    assert same != latents.digest(world, {"steps": 2})
    other = scenes.World(toy_atlas())
    object.__setattr__(other.atlas, "digest", "another")
    assert same != latents.digest(other, {"steps": 1})


def test_the_rate_warms_up_and_falls() -> None:
    settings = fit_base.BaseSettings()
    rates = [fit_base.pace(step, step / settings.steps, settings) for step in range(settings.steps)]
    assert rates[0] == pytest.approx(1 / settings.warm) and rates[settings.warm] == pytest.approx(1)
    assert rates[-1] < 0.011 and max(rates) <= 1.0001
    late = rates[round(settings.decay_from * settings.steps) + 1 :]
    assert all(a >= b for a, b in zip(late, late[1:], strict=False))


def test_nearly_clean_latents_count_less() -> None:
    class Noise:
        sigmas = torch.tensor([0.1, 0.5, 1.0, 14.0], dtype=torch.float64)

    found = fit_base.weights(Noise, torch.arange(4), 5.0)  # type: ignore[arg-type]
    plain = torch.tensor([6 / 101, 1, 1, 1], dtype=torch.float64)
    torch.testing.assert_close(found, plain / plain.mean())


def test_a_judge_is_told_the_truth() -> None:
    design = scenes.Scene("octopus", "noto", None, "blue", -20.0, 0.0, 90.0)
    assert judge.truth(design) == {
        "subject": "octopus",
        "style": "noto",
        "place": "left",
        "ground": "blue",
        "design": "octopus",
    }
    styled = judge.truth(dataclasses.replace(design, set="twemoji", technique="neon", x=-7.0))
    assert styled == {
        "subject": "octopus",
        "style": "neon",
        "place": None,
        "ground": None,
        "design": "another octopus",
    }
    assert judge.truth(dataclasses.replace(design, subject="cat"))["design"] == judge.OTHER
    numbers = judge.numbers([design, dataclasses.replace(design, x=-7.0)])
    assert numbers["place"].tolist() == [0, -1] and judge.names()["design"][numbers["design"][0]] == "octopus"


def test_judges_see_every_style_and_what_is_held_out(world: scenes.World) -> None:
    rng = random.Random(0)
    seen = [judge.any_scene(world, rng) for _ in range(4000)]
    assert {scene.style for scene in seen} == {*sets.SETS, *techniques.TECHNIQUES}
    assert {(s.subject, s.set) for s in seen} >= set(subjects.DESIGNS.items())


def test_a_judge_is_kept_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = judge.Judge()
    judge.save(model, tmp_path / "judge.safetensors")
    again = judge.load(tmp_path / "judge.safetensors")
    pictures = torch.rand(2, 3, 128, 128)
    with torch.no_grad():
        for head, logits in model(pictures).items():
            torch.testing.assert_close(again(pictures)[head], logits, atol=2e-2, rtol=2e-2)


def test_loras_are_asked_for_what_their_pictures_lack(world: scenes.World) -> None:
    everything = concepts.concepts(world)
    assert len({c.identifier for c in everything}) == len(everything) == len({c.name for c in everything})
    shown, unseen = concepts.style_subjects(world)
    assert len(shown) == concepts.SHOWN and len(unseen) == concepts.UNSEEN_SUBJECTS
    assert not set(shown) & set(unseen) and not {*shown, *unseen} & set(subjects.DESIGNS)
    for concept in everything:
        assert len(concept.scenes) == len(concept.prompts)
        assert all(concept.identifier in prompt.split() for prompt in concept.prompts)
        if concept.kind == "content":
            assert {(s.subject, s.set) for s in concept.scenes} == {(concept.name, subjects.DESIGNS[concept.name])}
            assert not {s.technique for s in concept.scenes} & set(concepts.OTHER_TECHNIQUES)
        else:
            taught = [s.subject for s in concept.scenes]
            assert taught[: len(shown)] == shown and len(set(taught)) == len(taught) <= concepts.STYLE_PICTURES
            assert not set(taught) & {*unseen, *subjects.DESIGNS}
            assert {s.style for s in concept.scenes} == {concept.name}
    assert set(concepts.OTHER_TECHNIQUES) < set(techniques.BASE_TECHNIQUES)


def test_a_gate_counts_what_is_right() -> None:
    class Says:
        def answers(self, pictures: torch.Tensor) -> dict[str, list[str]]:
            return {"subject": ["cat", "cat", "dog", "dog"], "style": ["noto", "flat", "noto", "flat"]}

    found = gates.rights(Says(), torch.zeros(4), subject=["cat", "dog", "dog", "dog"], style=["noto"] * 4)  # type: ignore
    assert found == {"subject": 0.75, "style": 0.5, "subject and style": 0.5}
    assert gates.passes("held out", {"subject and style": 0.6}) and not gates.passes(
        "base", {"subject": 1, "style": 0.8}
    )


def test_sharpness_is_whole_for_the_truth_and_less_for_a_blur() -> None:
    pictures = (torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    assert autoencoder.sharpness(pictures, pictures)["edges"] == pytest.approx(1)
    blurred = torch.nn.functional.avg_pool2d(pictures, 3, stride=1, padding=1)
    assert autoencoder.sharpness(blurred, pictures)["edges"] < 0.6
    noisy = autoencoder.sharpness((pictures - 0.1).clamp(0, 1), pictures)
    error = (pictures * 0.01).flatten(1).mean(1)
    assert noisy["psnr"] == pytest.approx(float((-10 * error.log10()).mean()), rel=1e-4)


def test_what_passed_takes_the_place_of_what_was_shipped(tmp_path: Path) -> None:
    work, folder = tmp_path / "work", tmp_path / "demo"
    taught = {"file": "loras/cat.safetensors", "pictures": ["pictures/cat/1.png"]}
    told = {"checkpoint": "weights/a", "judge": "weights/b", "loras": {"cat": taught}, "shown": {"whole": []}}
    for name in ("weights/a", "weights/b", "drawings.safetensors", "loras/dog.safetensors", *taught["pictures"]):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(name, encoding="utf-8")
    (work / "loras/cat.safetensors").write_text("new", encoding="utf-8")
    (work / "world.json").write_text(json.dumps(told), encoding="utf-8")
    (folder / "loras").mkdir(parents=True)
    for name in ("old", "cat"):
        (folder / "loras" / f"{name}.safetensors").write_text("old", encoding="utf-8")
    finish.ship(work, folder)
    assert {
        p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8") for p in folder.rglob("*") if p.is_file()
    } == {
        "weights/a": "weights/a",
        "weights/b": "weights/b",
        "drawings.safetensors": "drawings.safetensors",
        "loras/cat.safetensors": "new",
        "pictures/cat/1.png": "pictures/cat/1.png",
        "world.json": json.dumps(told),
    }
