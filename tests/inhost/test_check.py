"""Zip Check says what stock nodes draw and what dense algebra finds, finds faults by name, and changes nothing."""

from __future__ import annotations

import re

import folder_paths
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


def given(subject: str = "octopus", style: str = "gilded", **changed) -> dict:
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
        r"how much each LoRA changes what is drawn: subject (\d+|\d\.\d)% with its prompt, (\d+|\d\.\d)% without one; "
        r"style (\d+|\d\.\d)% with its prompt, (\d+|\d\.\d)% without one", figures,
    )  # fmt: skip
    assert re.fullmatch(r"a zip would take at most about \d+ (s|min), and at least \d+\.\d GB with the model", cost)
    assert f"prompt used for subject: '{learned('octopus')}' (as written on the node)" in below
    assert made.ui is not None and strip.shape[0] == 1 and strip.shape[-1] == 3 and strip.shape[1] > 900
    assert miniature.model.patches == {} and miniature.clip.patcher.patches == {}
    assert largest_difference(weights(miniature.model), before[0]) == 0
    assert torch.equal(miniature.clip.encode_from_tokens(miniature.clip.tokenize(DRAWN)), before[1])


def test_pictures_are_those_of_the_stock_nodes(pack, miniature, folder):  # noqa: F811
    """Load LoRA, CLIP Text Encode, Conditioning Zero Out and KSampler, with text-encoder parts on."""
    import nodes

    found, _ = looked(
        pack, miniature, **given("te_octopus", "te_gilded", subject_prompt="a figure", style_prompt="a star")
    )
    with torch.inference_mode():
        for place, (concept, name, words) in enumerate(
            (("content", "te_octopus", "a figure"), ("style", "te_gilded", "a star"))
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
    changed("gilded", "zeros", lambda key, t: t if key.endswith("alpha") else torch.zeros_like(t))
    found, report = looked(pack, miniature, **given(style="zeros", style_prompt=learned("gilded")))
    assert found.effects["style"].change["own"] == 0 and found.effects["style"].words is None
    assert found.effects["content"].spoiled == 0, "stacked with nothing, it is itself"
    assert torch.equal(*found.drawn["style"]) and not torch.equal(*found.drawn["content"])
    assert report[0] == "The style LoRA does nothing to the model: strength 0, or zeros in the file?"
    above = " ".join(report[: report.index("details")])
    assert "set its strength" in above and "trigger" not in above, "no words help"


def test_a_strength_of_zero_is_told_and_so_is_what_else_is_wrong(pack, miniature, folder):  # noqa: F811
    report = check(pack, miniature, **given(style_strength=0.0, subject_prompt="a photo of a cat")).args[1]
    above = report.split("  \n")[: report.split("  \n").index("details")]
    assert above[0] == (
        "The style LoRA does nothing to the model: strength 0, or zeros in the file? The subject prompt does not seem "
        "to wake its LoRA: its words say no more to it than ordinary words do."
    )
    assert [line.split(":")[0].split(",")[0] for line in above[2:4]] == ["At a strength of 0", "Try the words"]


def test_twice_as_strong_is_twice_the_numbers(pack, miniature, changed):
    """A file whose updates are half another's is that one at strength 0.5; what its words say to it stays."""
    changed("gilded", "halved", lambda key, t: t / 2 if re.search(r"lora_up|lora_B|\.up\.", key) else t)
    once, _ = looked(pack, miniature, **given(style_strength=0.25))  # at full strength this style is all there is
    doubled, _ = looked(pack, miniature, **given(style="halved", style_prompt=learned("gilded")))
    twice, _ = looked(pack, miniature, **given(style_strength=0.5))
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
    loaded = comfy.lora.load_lora(load_file(folder / file("gilded")), names)

    def encoded(words: str) -> torch.Tensor:
        return miniature.clip.encode_from_tokens_scheduled(miniature.clip.tokenize(words))[0][0][0].double()

    said, ratios = encoded(learned("gilded")) - encoded(""), []
    for key, patch in loaded.items():
        if re.search(r"attn2\.to_[kv]\.weight", key):
            dense = patch.weights[0].double() @ patch.weights[1].double()
            ratios.append(float((said @ dense.T).norm() / said.norm() / dense.norm()) * dense.shape[1] ** 0.5)
    assert ratios and found.effects["style"].words.own == pytest.approx(sum(ratios) / len(ratios), rel=1e-3)


@pytest.mark.parametrize("case", ["cat", "swapped"])
def test_wrong_prompts_are_told(pack, miniature, folder, lora_files, case):  # noqa: F811
    save_file(load_file(lora_files["moonlight"]), folder / file("moonlight"))
    folder_paths.filename_list_cache.clear()
    words = [learned("octopus"), learned("moonlight")]
    words = words[::-1] if case == "swapped" else ["a photo of a cat", words[1]]
    inputs = given(style="moonlight", subject_prompt=words[0], style_prompt=words[1])
    report = check(pack, miniature, **inputs).args[1].split("  \n")
    if case == "swapped":
        assert report[0] == "The two prompts look swapped: each LoRA answers to the other's words."
        assert "Try the two prompts the other way round." in report
    else:
        assert report[0] == (
            "The subject prompt does not seem to wake its LoRA: its words say no more to it than ordinary words do."
        )


def test_the_same_file_twice_is_a_verdict(pack, miniature, changed, monkeypatch):
    changed("octopus", "copy", lambda key, t: t.clone())
    monkeypatch.setattr(pack.nodes.bridge.check, "look", lambda *_: pytest.fail("it is drawn"))
    for style in ("octopus", "copy"):
        inputs = given(style=style, style_prompt="a star")
        assert pack.nodes.ZipCheck.validate_inputs(inputs["subject_lora"], inputs["style_lora"]) is True
        strip, report = check(pack, miniature, **inputs).args
        assert report.startswith("The same file twice: ") and f"'{file(style)}' hold the same LoRA" in report
        assert report.split("  \n")[0].endswith("; choose another file in subject_lora or style_lora.")
        assert strip.ndim == 4 and float(strip.min()) < 0.5, "the verdict is not in the picture"


def test_another_models_lora_is_a_verdict(pack, miniature, folder):  # noqa: F811
    from families import FAMILIES

    family = FAMILIES["SD 1.5"]
    save_file(family.lora(family.patcher().model, 2, 1), folder / file("other"))
    report = check(pack, miniature, **given(style="other", style_prompt="a star")).args[1]
    assert report.startswith("Wrong base model: 'other.safetensors' ")


def test_loras_that_share_no_layer_are_not_worth_zipping(pack, miniature, folder):  # noqa: F811
    """Each keeps one half of its layers: nothing is common, and the zip would say so too."""
    for place, name in enumerate(("octopus", "gilded")):
        tensors = load_file(folder / file(name))
        layers = sorted({re.split(r"\.(?:lora|alpha)", key)[0] for key in tensors})
        half = {layer for number, layer in enumerate(layers) if number % 2 == place}
        kept = {key: t for key, t in tensors.items() if re.split(r"\.(?:lora|alpha)", key)[0] in half}
        assert 0 < len(kept) < len(tensors)
        save_file(kept, folder / file(f"half_{name}"))
    words = {"subject_prompt": learned("octopus"), "style_prompt": learned("gilded")}
    report = check(pack, miniature, **given("half_octopus", "half_gilded", **words)).args[1].split("  \n")
    assert report[0] == pack.nodes.bridge.optimize.verdict.APART


@pytest.mark.parametrize("how", ["zeros", "another width"])
def test_layers_that_hear_nothing_are_as_none(pack, miniature, changed, monkeypatch, how):
    """LoRAs that reach layers which read the prompt by name alone: judged by passes, and no word of numbers."""
    reads = re.compile(r"attn2[._]to_[kv]")
    text = pack.nodes.bridge.network.text
    if how == "zeros":
        zeroed = lambda key: reads.search(key) and "alpha" not in key  # noqa: E731
        changed("gilded", "deaf", lambda key, t: torch.zeros_like(t) if zeroed(key) else t)
    else:
        changed("gilded", "deaf", lambda key, t: t)
        real, heard = text.readers, {}

        def readers(loras, concept):
            factors, core = real(loras, concept), pack.ziplora_core.lora_set
            heard[concept] = len(factors)
            wider = [core.Factors(f.up, torch.cat([f.down, f.down], 1), f.scale) for f in factors]
            return wider if concept == "style" else factors

        monkeypatch.setattr(text, "readers", readers)
    found, report = looked(pack, miniature, **given(style="deaf", style_prompt=learned("gilded")))
    assert found.effects["style"].words is None and found.effects["content"].words is not None
    assert "other" in found.effects["style"].change, "the other prompt is what tells swapped ones"
    assert "style: no layer of it hears the prompt by itself; its words were not looked at" in report
    assert not re.search(r"\bnan\b", "\n".join(report))
    above = report[: report.index("details")]
    asleep = report[0].startswith("The style LoRA does hardly more with this prompt than without one")
    told = any(line.startswith("Whether its prompt wakes the style LoRA cannot be told well") for line in above)
    assert asleep != told


def test_another_models_clip_is_said_before_a_tensor_fails(pack, miniature, folder):  # noqa: F811
    """Encoded twice as wide, as by another model's text encoder, and with numbers that are none."""
    for change, says in (
        (
            lambda context: torch.cat([context, context], -1),
            r"^subject_prompt is \d+ wide, this model's prompts are \d+: .*; "
            "connect the clip that came with this checkpoint$",
        ),
        (lambda context: context * float("nan"), r"^subject_prompt holds no usable numbers"),
    ):
        other = miniature.clip.clone()
        encode = other.encode_from_tokens_scheduled
        other.encode_from_tokens_scheduled = lambda tokens, encode=encode, change=change: [
            [change(context), options] for context, options in encode(tokens)
        ]
        with pytest.raises(ValueError, match=says):
            check(pack, miniature._replace(clip=other), **given())


@pytest.mark.parametrize("where", ["draw_plain", "with_predictor"])
def test_out_of_memory_names_drawn_size(pack, miniature, folder, monkeypatch, where):  # noqa: F811
    import comfy.model_management as management

    bridge = pack.nodes.bridge

    def fails(*_, **__):
        raise management.OOM_EXCEPTION("Allocation on device")

    place = bridge.drawing.sampling if where == "draw_plain" else bridge.network.predictor
    monkeypatch.setattr(place, where, fails)
    with pytest.raises(management.OOM_EXCEPTION) as failed:
        check(pack, miniature, **given(drawn_size=64))
    assert str(failed.value) == "not enough memory to draw and measure pictures of 64 x 64 pixels; lower drawn_size"


def test_a_text_encoder_is_moved_once_for_each_lora_with_a_part(pack, miniature, folder, monkeypatch):  # noqa: F811
    """All prompts of one clone come one after another, those without a part come from the clip itself, and none is
    encoded once the pictures are drawn."""
    import comfy.sd

    bridge, used = pack.nodes.bridge, []
    real, draw = comfy.sd.CLIP.encode_from_tokens_scheduled, bridge.drawing.sampling.draw_plain

    def encode(self, tokens, *args, **kwargs):
        used.append(self.patcher.patches_uuid)
        return real(self, tokens, *args, **kwargs)

    monkeypatch.setattr(comfy.sd.CLIP, "encode_from_tokens_scheduled", encode)
    monkeypatch.setattr(
        bridge.drawing.sampling, "draw_plain", lambda *args, **kw: used.append("drawn") or draw(*args, **kw)
    )
    check(pack, miniature, **given("te_octopus", "gilded", subject_prompt="a figure"))
    before, after = used[: used.index("drawn")], used[used.index("drawn") :]
    assert set(after) == {"drawn"}
    moves = [one for place, one in enumerate(before) if place == 0 or before[place - 1] != one]
    assert len(moves) == 2 and moves[1] == miniature.clip.patcher.patches_uuid
    used.clear()
    check(pack, miniature, **given())
    assert {*used} == {miniature.clip.patcher.patches_uuid, "drawn"}
    assert len(used) - used.count("drawn") == 7, "two prompts, four ordinary ones and the empty one, once each"


def test_words_of_files_beside_are_a_part_of_the_fingerprint(pack, miniature, folder, monkeypatch):  # noqa: F811
    """As of Zip LoRAs: of LoRAs that come by a stack, whose names the host gives to no fingerprint."""
    from comfy_execution.utils import CurrentNodeContext

    monkeypatch.setattr(pack.nodes.bridge.check, "look", lambda *_: (_ for _ in ()).throw(KeyError("enough")))
    for name in ("octopus", "gilded"):
        (folder / f"{name}.txt").write_text(WORDS[name], encoding="utf-8")
    inputs = given(subject_lora=NO_FILE, style_lora=NO_FILE, subject_prompt="", style_prompt="")
    stack = [(file(name), 1.0, 1.0) for name in ("octopus", "gilded")]

    def fingerprint() -> list:
        with CurrentNodeContext("prompt", "a check"):
            return pack.nodes.ZipCheck.fingerprint_inputs(**inputs)

    before = fingerprint()
    with CurrentNodeContext("prompt", "a check"), pytest.raises(KeyError, match="enough"):
        check(pack, miniature, **inputs, lora_stack=stack)
    assert fingerprint() == before
    (folder / "gilded.txt").write_text("other words", encoding="utf-8")
    assert fingerprint() != before


def test_notes_on_the_base_model_are_said_once_and_loaders_are_named(pack, miniature, folder, monkeypatch):  # noqa: F811
    import nodes

    bridge = pack.nodes.bridge
    monkeypatch.setattr(bridge.lora.base_models, "notes", lambda sources, _: ["'x' says that it was made for others"])
    model, clip = miniature.model, miniature.clip
    for name in ("te_octopus", "chalk"):
        model, clip = nodes.LoraLoader().load_lora(model, clip, file(name), 0.9, 0.9)
    words = {"subject_prompt": "a thing", "style_prompt": learned("chalk")}
    inputs = given(subject_lora=NO_FILE, style_lora=NO_FILE, **words)
    report = check(pack, miniature._replace(model=model, clip=clip), **inputs).args[1].split("  \n")
    assert report.count("note: 'x' says that it was made for others") == 1
    assert report.index("note: 'x' says that it was made for others") < report.index("details")
    for name in ("te_octopus", "chalk"):
        assert any(line.startswith(f"taken off the model: '{file(name)}' at 0.9") for line in report), report


def test_it_costs_a_part_of_a_zip(pack, miniature, folder, monkeypatch):  # noqa: F811
    """Rows through the network, counted at the network: of the check, and of the zip whose rows it reckons with."""
    rows = []
    handle = miniature.model.model.diffusion_model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    check(pack, miniature, **given())
    checked, expected = sum(rows), pack.nodes.bridge.optimize.progress.Progress
    rows.clear()
    with torch.inference_mode():
        quality = {"quality": "balanced", "subject_strength": 1.0, "style_strength": 1.0}
        monkeypatch.setattr(pack.nodes.bridge.drawing.recipes, "STEPS", 20)
        pack.nodes.ZipLoRAs.execute(miniature.model, miniature.clip, **given(), **quality)
    handle.remove()
    each = pack.nodes.bridge.drawing.recipes.of(miniature.model).rows(4)
    reckoned = 2 * each + expected(pack.ziplora_core.solver.Settings(), 2, [], each).rows
    assert checked <= 0.35 * sum(rows), (checked, sum(rows))
    assert reckoned == pytest.approx(sum(rows), rel=0.15)


def test_a_model_of_few_steps_is_drawn_in_these(pack, miniature, folder, monkeypatch):  # noqa: F811
    import comfy.sample

    real, seen = comfy.sample.sample, []

    def sample(model, noise, steps, cfg, *rest, **given):
        seen.append((steps, cfg))
        return real(model, noise, steps, cfg, *rest, **given)

    monkeypatch.setattr(comfy.sample, "sample", sample)
    name = "x_lightning_2step.safetensors"
    miniature.model.cached_patcher_init = (check, (name,))  # where newer hosts keep it
    monkeypatch.setattr(pack.nodes.bridge.lora.base_models, "running_checkpoints", lambda: [name])
    check(pack, miniature, **given())
    assert seen == [(2, 1.0)] * 4


def test_what_cannot_be_looked_at_is_refused_before_work(pack, miniature, folder, monkeypatch):  # noqa: F811
    monkeypatch.setattr(pack.nodes.bridge.check, "look", lambda *_: pytest.fail("work has begun"))
    node = pack.nodes.ZipCheck
    sockets = {"model": None, "clip": None}
    for changed, says in (
        ({"style_prompt": ""}, "style_prompt for 'gilded.safetensors' is empty, and no trigger words"),
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
    assert "'gone.safetensors' is missing" in node.validate_inputs("gone.safetensors", file("gilded"))


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


def test_an_interrupt_ends_the_look_at_words(pack, miniature, folder, monkeypatch):  # noqa: F811
    """Updates of many layers that are kept whole take a while: nothing is drawn after it."""
    import comfy.model_management as management

    bridge = pack.nodes.bridge
    real = bridge.network.text.readers

    def readers(*given):
        management.interrupt_current_processing()
        return real(*given)

    monkeypatch.setattr(bridge.network.text, "readers", readers)
    monkeypatch.setattr(bridge.drawing.sampling, "draw_plain", lambda *_: pytest.fail("it is drawn"))
    monkeypatch.setattr(pack.ziplora_core.words, "_size", lambda *_: pytest.fail("a layer was looked at"))
    with pytest.raises(management.InterruptProcessingException):
        check(pack, miniature, **given())


def test_three_and_one_are_looked_at_too(pack, miniature, folder):  # noqa: F811
    stack = [(file("chalk"), 1.0, 1.0)]
    found, report = looked(pack, miniature, **given(lora_stack=stack, stack_prompts=learned("chalk")))
    assert len(found.effects) == 3 and found.drawn.keys() == found.effects.keys()
    inputs = given(lora_stack=stack, stack_prompts=learned("chalk"), subject_lora=NO_FILE, style_lora=NO_FILE)
    found, report = looked(pack, miniature, **inputs)
    assert [effect.spoiled for effect in found.effects.values()] == [0.0]
    assert report[0].startswith("One LoRA alone")
    assert not any("would take" in line for line in report), "nothing is zipped"


def test_figures_that_are_no_numbers_are_no_verdict(pack, miniature, folder):  # noqa: F811
    """What stacking spoils too, and who is spoiled is named with what the figures mean."""
    bridge, core = pack.nodes.bridge, pack.ziplora_core
    heard = core.words.WordEffect(2.0, {}, (1.0,))
    with torch.inference_mode():
        sources = bridge.lora.loras.load_sources({"content": (file("octopus"), 1.0), "style": (file("gilded"), 1.0)})
        fitted = bridge.lora.fitting.fit(sources, miniature.model.model)

    def said(content: float, style: float) -> str:
        change = {"own": 0.3, "empty": 0.1}
        spoiled = {"content": content, "style": style}
        effects = {c: core.checkup.Effect(change, share, heard) for c, share in spoiled.items()}
        return bridge.findings.found(effects, fitted)[0]

    assert said(1.44, 0.42) == (
        "Worth zipping: LoRA loaders in a row spoil much of what the subject LoRA would draw alone (subject 144%; "
        "100%: as far from it as without LoRAs)."
    )
    assert "the subject and style LoRAs would draw alone (subject 144%, style 60%; 100%" in said(1.44, 0.6)
    assert said(0.042, 0.42).startswith("A plain stack is enough: ") and "(subject 4.2%, style 42%; 100%" in said(
        0.042, 0.42
    )
    for bad in (float("nan"), float("inf")):
        assert said(bad, 0.1).startswith("It cannot be told: what was measured is not finite.")
