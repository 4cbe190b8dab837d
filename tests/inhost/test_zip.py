"""Zip LoRAs gives bit for bit what the expert route gives, with the host's own loader and text encode on it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny
import torch
from families import FAMILIES
from safetensors.torch import load_file, save_file
from test_apply import largest_difference, weights
from test_text_encoder import with_text_encoder

NAMES = ("octopus", "chalk", "gilded")
WORDS = {"octopus": "an octopus", "chalk": "a picture in chalk style", "gilded": "a picture in gilded style"}
DRAWN = "an octopus in chalk style"
NO_FILE = "[None]"


def file(name: str) -> str:
    return f"{name}.safetensors"


@pytest.fixture
def folder(tmp_path, monkeypatch, lora_files, miniature) -> Path:
    """The miniature's LoRAs, and as `te_NAME` the same with text-encoder parts."""
    import folder_paths

    for seed, name in enumerate(NAMES):
        tensors = load_file(lora_files[name])
        parts = with_text_encoder(miniature.model, miniature.clip, seed)
        parts = {key: 0.3 * tensor for key, tensor in parts.items() if key.startswith("lora_te")}
        assert parts
        save_file(tensors, tmp_path / file(name))
        save_file({**tensors, **parts}, tmp_path / file(f"te_{name}"))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    folder_paths.filename_list_cache.clear()
    return tmp_path


@pytest.fixture(autouse=True)
def few_steps(pack, monkeypatch) -> None:
    """Of drawing a reference, in both routes: their number makes them no more alike."""
    monkeypatch.setattr(pack.nodes.bridge.drawing.recipes, "STEPS", 3)


def picture(height: int, width: int, seed: int, count: int = 1) -> torch.Tensor:
    noise = torch.rand(count, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(noise, (height, width), mode="bilinear").movedim(1, -1)


def taught(miniature, name: str, words: str, strength: float, clip_strength: float | None = None):
    """A training prompt as a user of the stock nodes sees it: Load LoRA, then CLIP Text Encode."""
    import nodes

    clip_strength = strength if clip_strength is None else clip_strength
    _, clip = nodes.LoraLoader().load_lora(miniature.model, miniature.clip, name, strength, clip_strength)
    return nodes.CLIPTextEncode().encode(clip, words)[0]


def encoded_picture(miniature, image: torch.Tensor, width: int, height: int) -> dict:
    """Each through Upscale Image and VAE Encode, then Latent Batch."""
    import comfy_extras.nodes_post_processing  # noqa: F401  first: two files of newer hosts import each other
    from comfy_extras.nodes_latent import LatentBatch

    import nodes

    found = None
    for frame in image:
        scaled = nodes.ImageScale().upscale(frame[None], "lanczos", width, height, "center")[0]
        made = nodes.VAEEncode().encode(miniature.vae, scaled)[0]
        if found is None:
            found = made
        elif hasattr(LatentBatch, "batch"):
            found = LatentBatch().batch(found, made)[0]
        else:
            found = LatentBatch.execute(found, made).args[0]
    return found


def expert(pack, miniature, sources, prompts, latents, more=(), **given):
    """(model, clip, zipped) of the nodes that a graph had before."""
    nodes = pack.nodes
    references = ()
    for prompt, made in more:
        references = nodes.ZipLoRAReference.execute(prompt, made, references).args[0]
    settings = {"steps": 10, "learning_rate": 0.01, "similarity_lambda": 0.01, "batch_size": 1, "seed": 3}
    zipped, _, report = nodes.ZipLoRAOptimize.execute(
        miniature.model, sources, *prompts, *latents, references=references, drawn_size=128, **settings
    ).args  # fmt: skip
    return (*nodes.ApplyZippedLoRA.execute(miniature.model, zipped, 1.0, miniature.clip).args, zipped, report)


def given(subject: str, style: str, **more) -> dict:
    """The node's inputs as the host hands them on."""
    made = {"subject_lora": subject, "style_lora": style, "subject_prompt": "", "style_prompt": "", "seed": 3}
    return {**made, "quality": "balanced", "subject_strength": 1.0, "style_strength": 1.0, **more}


def zipped_by(pack, miniature, **inputs):
    return pack.nodes.ZipLoRAs.execute(miniature.model, miniature.clip, **inputs)


def assert_same(ours, theirs, miniature) -> None:
    """Coefficients, patched weights and what the text encoder makes of a prompt, to the last bit."""
    model, clip, zipped = ours.args[:3]
    their_model, their_clip, their_zipped = theirs[:3]
    assert list(zipped.coefficients.by_concept) == list(their_zipped.coefficients.by_concept)
    for concept, of in their_zipped.coefficients.by_concept.items():
        assert of and all(torch.equal(zipped.coefficients[concept][name], m) for name, m in of.items())
    assert zipped.settings == their_zipped.settings and zipped.method == their_zipped.method
    found = weights(model)
    assert largest_difference(found, weights(their_model)) == 0
    assert largest_difference(found, weights(miniature.model)) > 1e-3
    tokens = clip.tokenize(DRAWN)
    assert torch.equal(clip.encode_from_tokens(tokens), their_clip.encode_from_tokens(tokens))


def moved(zipped) -> bool:
    return any(not bool((m == 1).all()) for of in zipped.coefficients.by_concept.values() for m in of.values())


@pytest.mark.parametrize("kind", ["", "te_"], ids=["plain", "text encoder"])
def test_two_are_the_expert_route(pack, miniature, folder, kind):
    strengths = dict(zip(NAMES, (0.9, 1.1, 1.0), strict=True))
    subject, style = (file(kind + name) for name in NAMES[:2])
    words = [WORDS[name] for name in NAMES[:2]]
    before = weights(miniature.model), miniature.clip.encode_from_tokens(miniature.clip.tokenize(DRAWN))
    with torch.inference_mode():
        ours = zipped_by(
            pack, miniature, **given(subject, style, subject_prompt=words[0], style_prompt=words[1],
            subject_strength=0.9, style_strength=1.1),
        )  # fmt: skip
        pair = pack.nodes.LoadLoRAPair.execute(subject, style, 0.9, 1.1).args[0]
        prompts = [taught(miniature, file(kind + n), WORDS[n], strengths[n]) for n in NAMES[:2]]
        theirs = expert(pack, miniature, pair, prompts, (None, None))
        bare = taught(miniature, file(kind + NAMES[0]), WORDS[NAMES[0]], 0.0)[0][0]
    assert_same(ours, theirs, miniature)
    assert moved(ours.args[2]) and torch.equal(bare, prompts[0][0][0]) == (not kind)
    assert largest_difference(weights(miniature.model), before[0]) == 0
    assert torch.equal(miniature.clip.encode_from_tokens(miniature.clip.tokenize(DRAWN)), before[1])
    assert ours.ui is not None, "the drawn references are not shown"
    report = ours.args[3]
    assert report == ours.args[2].report
    assert f"prompt used for subject: '{words[0]}' (as written on the node)" in report
    assert ("own prompt was encoded with it" in report) == bool(kind)
    assert "a prompt does not tell" not in report
    assert ("a prompt does not tell" in theirs[3]) == bool(kind)


def test_pictures_of_any_size_are_the_expert_route(pack, miniature, folder):
    subject, style = picture(96, 200, 1, count=2), picture(300, 300, 2)
    words = [WORDS[name] for name in NAMES[:2]]
    with torch.inference_mode():
        ours = zipped_by(
            pack, miniature, **given(file(NAMES[0]), file(NAMES[1]), subject_prompt=words[0], style_prompt=words[1]),
            subject_images=subject, style_images=style, vae=miniature.vae,
        )  # fmt: skip
        pair = pack.nodes.LoadLoRAPair.execute(file(NAMES[0]), file(NAMES[1]), 1.0, 1.0).args[0]
        latents = encoded_picture(miniature, subject, 184, 88), encoded_picture(miniature, style, 128, 128)
        prompts = [taught(miniature, file(n), WORDS[n], 1.0) for n in NAMES[:2]]
        theirs = expert(pack, miniature, pair, prompts, latents)
    assert_same(ours, theirs, miniature)
    assert ours.ui is None and moved(ours.args[2])


@pytest.mark.parametrize("own", [0, 1, 2], ids=["stack alone", "subject and stack", "pair and stack"])
def test_three_are_the_expert_route(pack, miniature, folder, own):
    """The roles are those of Load LoRA Stack; a stack's own text-encoder strength counts; one that is off is left out
    and keeps its line."""
    files = [file(f"te_{name}") for name in NAMES]
    strengths = [(0.9, 0.9), (0.8, 0.8), (0.7, 0.4)]
    stack = [(f, *s) for f, s in zip(files, strengths, strict=True)]
    in_stack = [*stack[own:], (file("chalk"), 0.0, 0.0)]
    lines = "\n".join([*(WORDS[name] for name in NAMES[own:]), "", "\n"])
    roles = "subject, style, other" if own != 1 else "subject, other, other"
    chosen = [*files[:own], *[NO_FILE] * (2 - own)]
    words = dict(zip(("subject_prompt", "style_prompt"), [WORDS[n] for n in NAMES[:own]], strict=False))
    numbers = {"subject_strength": 0.9} if own else {}
    numbers |= {"style_strength": 0.8} if own == 2 else {}
    with torch.inference_mode():
        ours = zipped_by(
            pack, miniature, **{**given(*chosen), **words, **numbers}, lora_stack=in_stack, stack_prompts=lines
        )
        sources = pack.nodes.LoadLoRAStack.execute(stack, roles).args[0]
        prompts = [taught(miniature, f, WORDS[n], *s) for f, n, s in zip(files, NAMES, strengths, strict=True)]
        theirs = expert(pack, miniature, sources, prompts[:2], (None, None), [(prompts[2], None)])
    assert_same(ours, theirs, miniature)
    assert len(ours.args[2].coefficients.by_concept) == 3
    last = list(ours.args[2].coefficients.by_concept)[-1]
    assert f"prompt used for {last}: '{WORDS['gilded']}' (as written on the node)" in ours.args[3]


def test_fast_looks_at_the_files_alone(pack, miniature, folder, monkeypatch):
    monkeypatch.setattr(pack.nodes.bridge.zip, "prompts", lambda _: pytest.fail("a prompt is asked for"))
    monkeypatch.setattr(pack.nodes.bridge.zip, "_encoded", lambda *_: pytest.fail("a prompt is encoded"))
    inputs = given(file("te_octopus"), file("chalk"), quality="fast", seed=0)
    with torch.inference_mode():
        ours = zipped_by(pack, miniature, **inputs)
        pair = pack.nodes.LoadLoRAPair.execute(file("te_octopus"), file("chalk"), 1.0, 1.0).args[0]
        zipped = pack.nodes.DirectMergeLoRA.execute(miniature.model, pair, "shared columns").args[0]
        theirs = (*pack.nodes.ApplyZippedLoRA.execute(miniature.model, zipped, 1.0, miniature.clip).args, zipped)
    assert_same(ours, theirs, miniature)
    assert moved(zipped)


def test_qualities_are_settings_of_the_expert_node(pack, miniature, folder, monkeypatch):
    node, bridge = pack.nodes.optimize, pack.nodes.bridge.zip
    papers = {"steps": 100, "learning_rate": 0.01, "similarity_lambda": 0.01, "batch_size": 1, "seed": 7}
    papers |= {"objective": "paper", "solver": "gradient"}
    schema = {i.id: i.default for i in pack.nodes.ZipLoRAOptimize.define_schema().inputs if hasattr(i, "default")}
    defaults = {**{name: schema[name] for name in papers}, "ridge": schema["ridge"], "seed": 7}
    for quality, expected in (("balanced", defaults), ("paper", papers)):
        seen = []

        def optimize(*inputs, seen=seen):
            seen.extend(inputs)
            raise InterruptedError

        monkeypatch.setattr(bridge.zipping, "optimize", optimize)
        words = {"subject_prompt": "a", "style_prompt": "b", "quality": quality, "seed": 7}
        with pytest.raises(InterruptedError), torch.inference_mode():
            zipped_by(pack, miniature, **{**given(file("octopus"), file("chalk")), **words})
        assert seen[4] == node.read_settings(**expected)[0]
        assert seen[5].side == 128 and seen[5].count == schema["drawn_references"]


def known(pack, prompt: str = "", source: str = ""):
    return pack.nodes.bridge.lora.triggers.Triggers(prompt=prompt, source=source)


def test_empty_prompts_are_what_the_files_say(pack, folder, monkeypatch):
    """Before a checkpoint is loaded: nothing else is asked for, and the host asks for model and clip only then."""
    bridge, node = pack.nodes.bridge.zip, pack.nodes.ZipLoRAs
    says = {file("octopus"): known(pack, "an octopus", "civitai.info"), file("chalk"): known(pack)}
    monkeypatch.setattr(bridge.triggers, "of_file", says.__getitem__)
    inputs = {**given(file("octopus"), file("chalk")), "model": None, "clip": None}
    with pytest.raises(
        ValueError, match=r"^style_prompt for 'chalk.safetensors' is empty, and no trigger words.*write"
    ):
        node.check_lazy_status(**inputs)
    inputs["style_prompt"] = " in chalk style"
    assert node.check_lazy_status(**inputs) == ["model", "clip"]
    listed = pack.nodes.zip.listed_loras(None, **inputs)
    found = bridge.prompts(listed)
    assert (found["content"].text, found["style"].text) == ("an octopus", " in chalk style")
    assert "trigger words from civitai.info" in found["content"].line("content")
    before = node.fingerprint_inputs(**inputs)
    says[file("octopus")] = known(pack, "an octopod", "civitai.info")
    assert node.fingerprint_inputs(**inputs) != before
    says[file("chalk")] = known(pack, "other words", "civitai.info")
    assert node.fingerprint_inputs(**{**inputs, "subject_prompt": "x"}) == node.fingerprint_inputs(
        **{**inputs, "subject_prompt": "y"}
    ), "what is known counts only where nothing is written"
    assert node.check_lazy_status(**{**inputs, "quality": "fast", "vae": None}) == ["model", "clip"]
    with_pictures = {**inputs, "subject_images": None, "vae": None}
    assert node.check_lazy_status(**with_pictures) == ["model", "clip", "subject_images", "vae"]


def test_what_can_be_refused_is_refused_before_work(pack, miniature, folder, monkeypatch):
    bridge = pack.nodes.bridge.zip
    monkeypatch.setattr(bridge, "_encoded", lambda *_: pytest.fail("work has begun"))
    a, b = file("octopus"), file("chalk")
    words = {"subject_prompt": "x", "style_prompt": "y"}
    for changed, says in (
        ({"style_lora": NO_FILE}, "style_lora is \\[None\\]; choose a file, or connect more LoRAs to lora_stack"),
        ({"style_lora": a}, "choose the subject's file in subject_lora"),
        ({"lora_stack": [], "stack_prompts": "a\nb"}, "stack_prompts has 2 lines, lora_stack 0 LoRAs"),
        ({"lora_stack": "x"}, "lora_stack is no list"),
        ({"lora_stack": [("gone.safetensors", 1, 1)], "stack_prompts": "a"}, "'gone.safetensors' is missing"),
        ({"lora_stack": [(file("gilded"), 1, 1)]}, "line 1 of stack_prompts for 'gilded.safetensors' is empty"),
        ({"subject_images": picture(64, 64, 0)}, "subject_images has to be encoded; connect the checkpoint's VAE"),
        ({"subject_images": "x", "vae": miniature.vae}, "subject_images is no picture"),
        ({"quality": "best"}, "quality is 'best'; expected one of: balanced, fast, paper"),
        ({"drawn_size": -8}, "drawn_size is -8"),
        ({"subject_strength": 1e9}, "subject_strength is"),
        ({"subject_prompt": "half \ud800"}, "subject_prompt holds half a character"),
        (
            {"subject_lora": NO_FILE, "lora_stack": [(a, 1, 1)], "stack_prompts": "x",
             "subject_images": picture(64, 64, 0), "vae": miniature.vae},
            "subject_images is connected, but subject_lora is",
        ),
        ({"subject_lora": NO_FILE, "style_lora": NO_FILE, "lora_stack": [(a, 0, 0)]}, "holds no LoRA with a strength"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            zipped_by(pack, miniature, **{**given(a, b), **words, **changed})
    alien = {key: torch.zeros(1, 1) for key in ("lora_unet_down_blocks_9_proj.lora_up.weight",
                                                "lora_unet_down_blocks_9_proj.lora_down.weight")}  # fmt: skip
    save_file(alien, folder / "alien.safetensors")
    with pytest.raises(ValueError, match="alien.safetensors.*has no layer that fits this model"):
        zipped_by(pack, miniature, **{**given(file("alien"), b), **words})


def test_errors_name_this_nodes_inputs_and_leave_names_of_files(pack, miniature, folder):
    """Whole words, and nothing in quotes, whatever a file is called."""
    ours = "my_content_lora.safetensors", "a 'content' dog's content_lora.safetensors"
    for name in ours:
        (folder / name).write_bytes((folder / file("octopus")).read_bytes())
    with pytest.raises(ValueError) as refused:
        zipped_by(pack, miniature, **given(*ours, subject_prompt="x", style_prompt="y"))
    rest = (
        "both the subject and the style LoRA, so there is nothing to zip; choose the subject's file in subject_lora "
        "and the style's in style_lora"
    )
    assert str(refused.value) == f"'{ours[0]}' and '{ours[1]}' hold the same LoRA, which would be {rest}"
    assert pack.nodes.ZipLoRAs.validate_inputs(ours[0], ours[0]) == f"'{ours[0]}' is {rest}"


@pytest.mark.parametrize(("quality", "easier"), [("balanced", "quality fast"), ("paper", "quality balanced or fast")])
def test_out_of_memory_says_what_users_of_this_node_can_change(pack, miniature, folder, monkeypatch, quality, easier):
    import comfy.model_management as management

    zipping = pack.nodes.bridge.optimize.zipping
    inputs = given(file("octopus"), file("chalk"), subject_prompt="x", style_prompt="y", quality=quality)
    theirs = r"learning_rate|drawn_references|batch_size|solver|latents|\bcontent\b"

    def fails(*given):
        raise management.OOM_EXCEPTION("Allocation on device")

    def says(kind: type[Exception]) -> str:
        with pytest.raises(kind) as failed, torch.inference_mode():
            zipped_by(pack, miniature, **inputs)
        assert not re.search(theirs, str(failed.value)), str(failed.value)
        return str(failed.value)

    with monkeypatch.context() as patch:
        patch.setattr(zipping, "_solve", fails)
        said = says(management.OOM_EXCEPTION)
        assert said.startswith("not enough memory to zip: about") and "GB were there" in said
        assert said.endswith(f"; lower drawn_size, or choose {easier}")

        def not_finite(*given):
            raise zipping.solver.NotFinite("the loss is not finite", 1, given[4].before, given[4].before, None)

        patch.setattr(zipping, "_solve", not_finite)
        assert f"; choose {easier}, or load the model in bf16 or fp32; " in says(FloatingPointError)
    monkeypatch.setattr(pack.nodes.bridge.drawing.references, "draw_plain", fails)
    said = says(management.OOM_EXCEPTION)
    assert re.match(r"not enough memory to draw \d+ subject references of 128 x 128 pixels; lower drawn_size, or", said)
    assert said.endswith("connect subject_images")


def test_words_of_a_stacks_files_are_a_part_of_the_fingerprint(pack, miniature, folder):
    """Where their prompts are empty. The host gives the stack itself to no fingerprint."""
    from comfy_execution.utils import CurrentNodeContext

    node, stack = pack.nodes.ZipLoRAs, [(file(name), 1.0, 1.0) for name in NAMES[:2]]
    for name in NAMES[:2]:
        (folder / f"{name}.txt").write_text(WORDS[name], encoding="utf-8")
    inputs = given(NO_FILE, NO_FILE)

    def fingerprint(running: str) -> list:
        with CurrentNodeContext("prompt", running):
            return node.fingerprint_inputs(**inputs, lora_stack=None)

    def run(running: str, **more) -> None:
        with CurrentNodeContext("prompt", running), torch.inference_mode():
            zipped_by(pack, miniature, **{**inputs, **more}, lora_stack=stack)

    before = fingerprint("empty")
    run("empty")
    run("written", stack_prompts="one\ntwo")
    assert fingerprint("empty") == before == fingerprint("written") == fingerprint("other")
    (folder / f"{NAMES[1]}.txt").write_text("other words", encoding="utf-8")
    after = fingerprint("empty")
    assert after != before == fingerprint("written") == fingerprint("other")
    run("empty")
    assert fingerprint("empty") == after
    save_file(load_file(folder / file("gilded")), folder / file(NAMES[0]))
    assert fingerprint("empty") not in (before, after) and fingerprint("written") != before
    (folder / file(NAMES[1])).unlink()
    gone = fingerprint("written")
    assert gone == fingerprint("written") and gone != before


def test_files_are_checked_while_the_prompt_is_queued(pack, folder):
    node, a, b = pack.nodes.ZipLoRAs, file("octopus"), file("chalk")
    assert node.validate_inputs(a, b) is node.validate_inputs(NO_FILE, NO_FILE) is node.validate_inputs(None, b) is True
    assert "choose the subject's file in subject_lora" in node.validate_inputs(a, a)
    assert node.validate_inputs(a, "gone.safetensors").startswith("style_lora: 'gone.safetensors' is missing")
    (folder / "broken.safetensors").write_bytes(b"\x00" * 40)
    assert "subject_lora: 'broken.safetensors'" in node.validate_inputs("broken.safetensors", b)


def test_an_interrupt_passes_through_and_leaves_model_and_clip(pack, miniature, folder):
    import comfy.model_management as management

    before = weights(miniature.model), miniature.clip.encode_from_tokens(miniature.clip.tokenize(DRAWN))
    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException), torch.inference_mode():
        inputs = given(file("te_octopus"), file("te_chalk"))
        zipped_by(pack, miniature, **{**inputs, "subject_prompt": "x", "style_prompt": "y"})
    assert largest_difference(weights(miniature.model), before[0]) == 0
    assert torch.equal(miniature.clip.encode_from_tokens(miniature.clip.tokenize(DRAWN)), before[1])


def test_what_a_model_draws_best_is_asked_of_its_family(pack, miniature):
    side = pack.nodes.bridge.drawing.sampling.best_side
    assert side(miniature.model) == 128 and side(tiny.tiny_patcher()) == 1024
    assert side(FAMILIES["SD 1.5"].patcher()) == 512 and side(FAMILIES["Flux"].patcher()) == 1024


def test_advanced_inputs_are_said_in_the_hosts_own_way(pack):
    """Of hosts whose schema has a word for them, and of those that hand on what it has not."""

    class Input:
        def __init__(self, **own):
            self.extra_dict = {}
            self.__dict__.update(own)

    advanced = pack.nodes.inputs.advanced
    assert vars(advanced(Input(advanced=None))) == {"extra_dict": {}, "advanced": True}
    assert vars(advanced(Input())) == {"extra_dict": {"advanced": True}}
    said = {i.id: i.as_dict().get("advanced", False) for i in pack.nodes.ZipLoRAs.define_schema().inputs}
    assert [name for name, hidden in said.items() if not hidden] == [
        "model", "clip", "subject_lora", "subject_prompt", "style_lora", "style_prompt", "quality", "seed",
    ]  # fmt: skip
