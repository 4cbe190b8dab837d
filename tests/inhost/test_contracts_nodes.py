"""What a node is given is what reaches the work behind it: each input under its own name."""

from __future__ import annotations

import pytest
import tiny
import torch
from test_apply import zip_pair
from test_dense_formats import stock  # noqa: F401
from test_scores import CLIP, DINO, encoder
from test_training import pictures


def node(pack, name: str):
    return next(node for node in pack.nodes.NODES if node.__name__ == name)


@pytest.fixture(scope="module")
def patcher():
    return tiny.tiny_patcher()


@pytest.fixture(scope="module")
def zipped(pack, patcher):
    return zip_pair(pack, patcher, tiny.sources(pack, patcher.model))


@pytest.mark.parametrize("value", [None, "text", 3, 0.5, [1], {}])
def test_a_value_in_the_place_of_a_link_is_named(pack, value):
    for name, given in (
        ("StyleStrength", {"style_strength": 1.0, "content_strength": 1.0}),
        ("ApplyZippedLoRA", {"model": object(), "strength": 1.0}),
        ("ZippedLoRAReport", {"layout": "one picture"}),
    ):
        with pytest.raises(ValueError, match="zipped_lora is not connected"):
            node(pack, name).execute(zipped_lora=value, **given)


def test_dials_multiply_each_on_its_side(pack, zipped):
    once = node(pack, "StyleStrength").execute(zipped, style_strength=0.5, content_strength=1.5).args[0]
    twice = node(pack, "StyleStrength").execute(once, style_strength=0.4, content_strength=0.2).args[0]
    assert (twice.dials["style"], twice.dials["content"]) == pytest.approx((0.2, 0.3))
    for side, dial in (("style", 0.2), ("content", 0.3)):
        for name, m in twice.coefficients[side].items():
            torch.testing.assert_close(m, dial * zipped.coefficients[side][name])


def test_pair_loras_keeps_order_and_strengths(pack, patcher):
    files = [tiny.full_size.attention_lora(patcher.model, 2, seed) for seed in (1, 2)]
    (pair,) = node(pack, "PairLoRAs").execute(*files, 0.3, 0.7).args
    for source, file, strength in ((pair["content"], files[0], 0.3), (pair["style"], files[1], 0.7)):
        assert source.strength == strength and all(source.tensors[k] is t for k, t in file.items())


def test_settings_of_optimize_are_those_of_its_inputs(pack):
    read = node(pack, "ZipLoRAOptimize").execute.__func__.__globals__["read_settings"]
    given = {"steps": 7, "learning_rate": 0.5, "similarity_lambda": 0.25, "batch_size": 3, "seed": 11, "ridge": 0.75}
    settings, asked = read(**given, objective="paper", solver="layerwise", drawn_references=5, drawn_size=72)
    assert {name: getattr(settings, name) for name in given} == given
    assert (settings.objective.name, settings.solver, asked.count, asked.side) == ("paper", "layerwise", 5, 72)


def test_latents_are_asked_for_before_prompts(pack, patcher):
    """So that what they show can be refused before a text encoder is loaded."""
    given = {"steps": 1, "learning_rate": 0.1, "similarity_lambda": 0.1, "batch_size": 1, "seed": 0}
    status = node(pack, "ZipLoRAOptimize").check_lazy_status
    sockets = {"model": patcher, "lora_pair": tiny.sources(pack, patcher.model)}
    sockets |= {"content_positive": None, "style_positive": None}
    latents = {f"{c}_latents": made for c, made in tiny.latents().items()}
    prompts = ["content_positive", "style_positive"]
    assert status(**sockets, **given, content_latents=None, style_latents=None) == list(latents)
    assert status(**sockets, **given, style_latents=None) == ["style_latents"]
    assert status(**sockets, **given, **latents) == prompts == status(**sockets, **given)
    latents["style_latents"] = {"samples": torch.zeros(1, 16, 8, 8)}
    with pytest.raises(ValueError, match="style_latents has shape"):
        status(**sockets, **given, **latents)


def test_the_layout_is_the_one_that_is_named(pack, zipped, monkeypatch):
    report, asked = node(pack, "ZippedLoRAReport"), []
    names = report.execute.__func__.__globals__
    monkeypatch.setitem(names, "draw", lambda subject, apart: asked.append(apart) or torch.zeros(1, 8, 8, 3))
    monkeypatch.setattr(names["ui"], "PreviewImage", lambda *_, **__: None)
    for layout in ("one picture", "a picture for each panel"):
        report.execute(zipped, layout)
    assert asked == [False, True]


def test_the_panel_of_interference_is_before_and_after(pack, zipped):
    from dataclasses import replace

    from matplotlib.figure import Figure

    figures, analysis = node(pack, "ZippedLoRAReport").execute.__func__.__globals__, pack.ziplora_core.analysis
    g = torch.Generator().manual_seed(0)
    own = zipped.coefficients
    content = {k: torch.rand(m.shape, generator=g) for k, m in own["content"].items()}
    wild = replace(own, by_concept={**own.by_concept, "content": content})
    axes = Figure().add_subplot()
    panels = figures["draw"].__globals__
    panels["interference"](axes, figures["Subject"](zipped.fitted.loras, wild, None))
    shown = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    for label, coefficients in (("direct merge", own), ("this merge", wild)):
        expected = list(analysis.column_interference(zipped.fitted.loras, coefficients).values())
        assert shown[label] == pytest.approx(expected) and len(expected) > 10


def test_scores_see_subjects_by_dino_and_styles_by_clip(pack, tmp_path):
    import json

    encoders = encoder(tmp_path, CLIP), encoder(tmp_path, DINO)
    images, subject, style = (torch.rand(n, 40, 40, 3, generator=torch.Generator().manual_seed(n)) for n in (2, 1, 3))
    with torch.inference_mode():
        _, text = node(pack, "ZipLoRAScores").execute(images, subject, style, *encoders, prompt="").args
        features = [[e.encode_image(x)["image_embeds"].float() for x in (images, subject, style)] for e in encoders]
    found = json.loads(text)
    clip, dino = features
    for name, seen, wanted in (("style", clip[0], clip[2]), ("subject", dino[0], dino[1])):
        cosines = torch.nn.functional.normalize(seen, dim=1) @ torch.nn.functional.normalize(wanted, dim=1).T
        assert found[name]["pictures"] == pytest.approx(cosines.mean(1).tolist(), abs=1e-3), name


def test_sides_of_a_blind_sheet_follow_their_seed(pack):
    sides = node(pack, "BlindABSheet").execute.__func__.__globals__["sheet"].sides
    assert sides(40, 40, 5) == sides(40, 40, 5) != sides(40, 40, 6)


TRAIN = {
    "prompt": ["a sks dog"],
    "steps": [7],
    "learning_rate": [0.25],
    "rank": [3],
    "batch_size": [2],
    "resolution": [128],
    "layers": ["B-LoRA"],
    "seed": [11],
    "filename_prefix": ["loras/x"],
    "sample_every": [5],
    "save_every": [6],
    "continue_from": ["mine.safetensors"],
    "class_prompt": ["a dog"],
    "class_count": [9],
    "prior_weight": [0.125],
    "second_prompt": ["a house\nin szn style"],
}


def test_training_gets_every_input_under_its_name(pack, monkeypatch):
    execute, tasks = node(pack, "TrainConceptLoRA").execute, []
    training = execute.__func__.__globals__["concept"]
    from types import SimpleNamespace

    done = SimpleNamespace(lora_model={}, loss_map={}, report="", file="loras/x.safetensors")
    monkeypatch.setattr(training, "train_concept", lambda model, clip, vae, task: tasks.append(task) or done)
    sets = [[pictures(1, seed=s)] for s in range(3)]
    execute(sets[0], sets[1], sets[2], model=[object()], clip=[object()], vae=[object()], **TRAIN)
    (task,) = tasks
    for name in ("steps", "learning_rate", "rank", "batch_size", "seed", "prior_weight"):
        assert getattr(task.settings, name) == TRAIN[name][0], name
    for name in ("resolution", "layers", "sample_every", "save_every", "class_prompt", "class_count"):
        assert getattr(task, name) == TRAIN[name][0], name
    assert (task.prefix, task.go_on_from) == ("loras/x", "mine.safetensors")
    assert [s.pictures for s in task.sets] == sets[:2] and task.class_pictures == sets[2]
    assert [s.prompts for s in task.sets] == [["a sks dog"], ["a house", "in szn style"]]


def test_unzip_gets_every_input_under_its_name(pack, monkeypatch):
    execute, tasks = node(pack, "UnZipLoRA").execute, []
    from types import SimpleNamespace

    done = SimpleNamespace(pair=1, zipped=2, loss_map={}, report="", files=["a", "b"])
    monkeypatch.setitem(
        execute.__func__.__globals__, "unzip_picture", lambda model, clip, vae, task: tasks.append(task) or done
    )
    switches = {"prompt_separation": "prompts_apart", "column_separation": "columns_apart"}
    switches |= {"block_separation": "blocks_apart", "trained_as_used": "as_used"}
    picture = pictures(1)
    settings = {"steps": 7, "learning_rate": 0.25, "rank": 3, "batch_size": 2, "seed": 11, "similarity_lambda": 0.75}
    given = {"prompt": "a sks dog in szn style", "content_prompt": "a sks dog", "style_prompt": "szn style"}
    given |= {"resolution": 128, "filename_prefix": "loras/x", "sample_every": 5, "save_every": 6}
    given |= {"continue_from": "mine.safetensors", "content_blocks": "middle_block", "style_blocks": "input_blocks.4"}
    given |= {"merger_learning_rate": 0.125, "column_share": 12.0}
    sockets = {"model": object(), "clip": object(), "vae": object(), "image": picture}
    for off in switches:
        execute(**sockets, **settings, **given, **{name: name != off for name in switches})
        task = tasks[-1]
        assert {name: getattr(task, field) for name, field in switches.items()} == {n: n != off for n in switches}
    assert {name: getattr(task.settings, name) for name in settings} == settings
    assert (task.settings.merger_rate, task.settings.share) == (0.125, pytest.approx(0.12))
    assert task.prompts == {
        "full": given["prompt"], "content": given["content_prompt"], "style": given["style_prompt"]
    }  # fmt: skip
    assert (task.prefix, task.resolution, task.sample_every, task.save_every) == ("loras/x", 128, 5, 6)
    assert task.go_on_from == "mine.safetensors" and task.picture is picture
    assert task.blocks == {"content": ("middle_block.",), "style": ("input_blocks.4.",)}
