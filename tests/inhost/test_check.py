"""Zip Check says what stock nodes draw and what dense algebra finds, finds faults by name, and changes nothing."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_apply import largest_difference, weights
from test_zip import DRAWN, NO_FILE, WORDS, file, folder  # noqa: F401

PAPER = "column|coefficient|lambda|ridge|retention|objective|layerwise|content"


def learned(name: str) -> str:
    """The prompt that a shipped LoRA was trained with."""
    from demo.manifest import read_manifest

    manifest = read_manifest()
    return next(t.learned.prompt for t in (*manifest.subjects, *manifest.styles) if t.name == name)


def given(subject: str = "mushroom", style: str = "ember", **changed) -> dict:
    words = [learned(name) if name in WORDS else "" for name in (subject, style)]
    made = {"subject_lora": file(subject), "style_lora": file(style), "subject_prompt": words[0]}
    return {**made, "style_prompt": words[1], "seed": 3, **changed}


def check(pack, miniature, **inputs):
    with torch.inference_mode():
        return pack.nodes.ZipCheck.execute(miniature.model, miniature.clip, **inputs)


def looked(pack, miniature, **inputs):
    """What is measured, as the node has it measured."""
    bridge = pack.nodes.bridge
    found = {}
    real = bridge.check.look

    def look(*args):
        found["looked"] = real(*args)
        return found["looked"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bridge.check, "look", look)
        report = check(pack, miniature, **inputs).args[1]
    return found["looked"], report.split("  \n")


def test_right_prompts_are_found_good_and_nothing_is_changed(pack, miniature, folder):  # noqa: F811
    before = weights(miniature.model), miniature.clip.encode_from_tokens(miniature.clip.tokenize(DRAWN))
    made = check(pack, miniature, **given())
    strip, report = made.args
    above, found, below = report.partition("  \ndetails  \n")
    assert found and not re.search(PAPER, above), above
    verdict, figures, cost = above.split("  \n")[:3]
    assert re.match("Worth zipping|A plain stack is enough", verdict), verdict
    assert re.fullmatch(
        r"how much each LoRA changes what is drawn: subject \d+% with its prompt, \d+% without one; "
        r"style \d+% with its prompt, \d+% without one", figures,
    )  # fmt: skip
    assert re.fullmatch(r"a zip would take about \d+ (s|min) and \d+\.\d GB with the model", cost)
    assert f"prompt used for subject: '{learned('mushroom')}' (as written on the node)" in below
    assert made.ui is not None and strip.shape[0] == 1 and strip.shape[-1] == 3 and strip.shape[1] > 900
    assert miniature.model.patches == {} and miniature.clip.patcher.patches == {}
    assert largest_difference(weights(miniature.model), before[0]) == 0
    assert torch.equal(miniature.clip.encode_from_tokens(miniature.clip.tokenize(DRAWN)), before[1])


def test_pictures_are_those_of_the_stock_nodes(pack, miniature, folder):  # noqa: F811
    """Load LoRA, CLIP Text Encode, Conditioning Zero Out and KSampler, with text-encoder parts on."""
    import nodes

    found, _ = looked(
        pack, miniature, **given("te_mushroom", "te_ember", subject_prompt="a figure", style_prompt="a star")
    )
    with torch.inference_mode():
        for place, (concept, name, words) in enumerate(
            (("content", "te_mushroom", "a figure"), ("style", "te_ember", "a star"))
        ):
            for with_lora in (0, 1):
                model, clip = nodes.LoraLoader().load_lora(
                    miniature.model, miniature.clip, file(name), float(with_lora), float(with_lora)
                )  # fmt: skip
                positive = nodes.CLIPTextEncode().encode(clip, words)[0]
                negative = nodes.ConditioningZeroOut().zero_out(positive)[0]
                empty = nodes.EmptyLatentImage().generate(128, 128, 1)[0]
                theirs = nodes.KSampler().sample(
                    model, 3 + place, 8, 4.0, "euler", "normal", positive, negative, empty, 1.0
                )[0]["samples"]  # fmt: skip
                ours = found.drawn[concept][with_lora]
                assert float((ours - theirs).norm() / theirs.norm()) < 1e-3, (concept, with_lora)


@pytest.fixture
def changed(folder):  # noqa: F811
    """Writes a LoRA whose tensors are another's, changed."""

    def write(name: str, to: str, change) -> str:
        save_file({key: change(key, t) for key, t in load_file(folder / file(name)).items()}, folder / file(to))
        return to

    return write


def test_a_lora_of_zeros_does_nothing(pack, miniature, changed):
    changed("ember", "zeros", lambda key, t: t if key.endswith("alpha") else torch.zeros_like(t))
    found, report = looked(pack, miniature, **given(style="zeros", style_prompt=learned("ember")))
    assert found.effects["style"].change["own"] == 0 and found.effects["style"].words.own == 0
    assert found.effects["content"].spoiled == 0, "stacked with nothing, it is itself"
    assert torch.equal(*found.drawn["style"]) and not torch.equal(*found.drawn["content"])
    assert report[0].startswith("The style LoRA does nothing with this prompt: trigger word?")
    assert "trigger word included" in " ".join(report)


def test_twice_as_strong_is_twice_the_numbers(pack, miniature, changed):
    """A file whose updates are twice another's is that one at strength 2; what its words say to it stays."""
    changed("ember", "doubled", lambda key, t: 2 * t if re.search(r"lora_up|lora_B|\.up\.", key) else t)
    once, _ = looked(pack, miniature, **given())
    doubled, _ = looked(pack, miniature, **given(style="doubled", style_prompt=learned("ember")))
    twice, _ = looked(pack, miniature, **given(style_strength=2.0))
    for mine, theirs in zip(doubled.drawn["style"], twice.drawn["style"], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    assert doubled.effects["style"].change == pytest.approx(twice.effects["style"].change, rel=1e-3)
    for prompt, change in twice.effects["style"].change.items():
        assert 1.2 * once.effects["style"].change[prompt] < change
    assert doubled.effects["style"].words.own == pytest.approx(once.effects["style"].words.own, rel=1e-4)
    assert twice.effects["content"].spoiled > once.effects["content"].spoiled


def test_words_are_answered_as_the_dense_update_does(pack, miniature, folder):  # noqa: F811
    """Through the host's own loader of files and text encode."""
    import comfy.lora

    found, _ = looked(pack, miniature, **given())
    names = comfy.lora.model_lora_keys_unet(miniature.model.model, {})
    loaded = comfy.lora.load_lora(load_file(folder / file("ember")), names)

    def encoded(words: str) -> torch.Tensor:
        return miniature.clip.encode_from_tokens_scheduled(miniature.clip.tokenize(words))[0][0][0].double()

    said, ratios = encoded(learned("ember")) - encoded(""), []
    for key, patch in loaded.items():
        if re.search(r"attn2\.to_[kv]\.weight", key):
            dense = patch.weights[0].double() @ patch.weights[1].double()
            ratios.append(float((said @ dense.T).norm() / said.norm() / dense.norm()) * dense.shape[1] ** 0.5)
    assert ratios and found.effects["style"].words.own == pytest.approx(sum(ratios) / len(ratios), rel=1e-3)


@pytest.mark.parametrize("case", ["cat", "swapped"])
def test_wrong_prompts_are_told(pack, miniature, folder, case):  # noqa: F811
    words = [learned("mushroom"), learned("ember")]
    words = words[::-1] if case == "swapped" else ["a photo of a cat", words[1]]
    report = check(pack, miniature, **given(subject_prompt=words[0], style_prompt=words[1])).args[1].split("  \n")
    if case == "swapped":
        assert report[0] == "The two prompts look swapped: each LoRA answers to the other's words."
        assert "Try the two prompts the other way round." in report
    else:
        assert report[0] == "The subject LoRA does hardly more with this prompt than without one: trigger word?"


def test_the_same_file_twice_is_a_verdict(pack, miniature, changed, monkeypatch):
    changed("mushroom", "copy", lambda key, t: t.clone())
    monkeypatch.setattr(pack.nodes.bridge.check, "look", lambda *_: pytest.fail("it is drawn"))
    for style in ("mushroom", "copy"):
        inputs = given(style=style, style_prompt="a star")
        assert pack.nodes.ZipCheck.validate_inputs(inputs["subject_lora"], inputs["style_lora"]) is True
        strip, report = check(pack, miniature, **inputs).args
        assert report.startswith("The same file twice: ") and f"'{file(style)}' hold the same LoRA" in report
        assert strip.ndim == 4 and float(strip.min()) < 0.5, "the verdict is not in the picture"


def test_another_models_lora_is_a_verdict(pack, miniature, folder):  # noqa: F811
    from families import FAMILIES

    family = FAMILIES["SD 1.5"]
    save_file(family.lora(family.patcher().model, 2, 1), folder / file("other"))
    report = check(pack, miniature, **given(style="other", style_prompt="a star")).args[1]
    assert report.startswith("Wrong base model: 'other.safetensors' ")


def test_it_costs_a_part_of_a_zip(pack, miniature, folder, monkeypatch):  # noqa: F811
    """Rows through the network, counted at the network: of the check, and of the zip whose rows it reckons with."""
    rows = []
    handle = miniature.model.model.diffusion_model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    check(pack, miniature, **given())
    checked, expected = sum(rows), pack.nodes.bridge.optimize.progress.Progress
    rows.clear()
    with torch.inference_mode():
        quality = {"quality": "balanced", "subject_strength": 1.0, "style_strength": 1.0}
        monkeypatch.setattr(pack.nodes.bridge.drawing.sampling, "STEPS", 20)
        pack.nodes.ZipLoRAs.execute(miniature.model, miniature.clip, **given(), **quality)
    handle.remove()
    each = pack.nodes.bridge.drawing.sampling.GeneratedReferences.rows(
        pack.nodes.bridge.drawing.sampling.ReferenceRequest(4, 128)
    )
    reckoned = 2 * each + expected(pack.ziplora_core.solver.Settings(), 2, [], each).rows
    assert checked <= 0.35 * sum(rows), (checked, sum(rows))
    assert reckoned == pytest.approx(sum(rows), rel=0.15)


def test_what_cannot_be_looked_at_is_refused_before_work(pack, miniature, folder, monkeypatch):  # noqa: F811
    monkeypatch.setattr(pack.nodes.bridge.check, "look", lambda *_: pytest.fail("work has begun"))
    node = pack.nodes.ZipCheck
    sockets = {"model": None, "clip": None}
    for changed, says in (
        ({"style_prompt": ""}, "style_prompt for 'ember.safetensors' is empty, and no trigger words"),
        ({"subject_prompt": "half \ud800"}, "subject_prompt holds half a character"),
        ({"style_lora": NO_FILE}, "style_lora is \\[None\\]"),
    ):
        with pytest.raises(ValueError, match=says):
            node.check_lazy_status(**{**given(**changed), **sockets})
        with pytest.raises(ValueError, match=says):
            check(pack, miniature, **given(**changed))
    assert node.check_lazy_status(**given(), **sockets) == ["model", "clip"]
    assert node.check_lazy_status(**given(), **sockets, vae=None) == ["model", "clip", "vae"]
    with pytest.raises(ValueError, match="drawn_size is -8"):
        check(pack, miniature, **given(drawn_size=-8))
    with pytest.raises(ValueError, match="subject_strength is"):
        check(pack, miniature, **given(subject_strength=1e9))
    assert "'gone.safetensors' is missing" in node.validate_inputs("gone.safetensors", file("ember"))


def test_an_interrupt_passes_through(pack, miniature, folder):  # noqa: F811
    import comfy.model_management as management

    calls = []

    def strike(*_):
        calls.append(1)
        if len(calls) == 40:
            management.interrupt_current_processing()

    handle = miniature.model.model.diffusion_model.register_forward_pre_hook(strike)
    with pytest.raises(management.InterruptProcessingException):
        check(pack, miniature, **given())
    handle.remove()
    assert len(calls) <= 41 and miniature.model.patches == {}


def test_three_and_one_are_looked_at_too(pack, miniature, folder):  # noqa: F811
    stack = [(file("dusk"), 1.0, 1.0)]
    found, report = looked(pack, miniature, **given(lora_stack=stack, stack_prompts=learned("dusk")))
    assert len(found.effects) == 3 and found.drawn.keys() == found.effects.keys()
    inputs = given(lora_stack=stack, stack_prompts=learned("dusk"), subject_lora=NO_FILE, style_lora=NO_FILE)
    found, report = looked(pack, miniature, **inputs)
    assert [effect.spoiled for effect in found.effects.values()] == [0.0]
    assert report[0].startswith("One LoRA alone")
