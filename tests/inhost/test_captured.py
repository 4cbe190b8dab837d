"""LoRAs that loaders have put on a model, zipped: to the last bit what the same files give by name."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_apply import largest_difference, weights
from test_zip import DRAWN, NAMES, NO_FILE, WORDS, assert_same, few_steps, file, folder, given, zipped_by  # noqa: F401

FILES = [file(f"te_{NAMES[0]}"), file(NAMES[1]), file(f"te_{NAMES[2]}")]


def loader(miniature, name, strength, clip_strength):
    import nodes

    model, clip = nodes.LoraLoader().load_lora(miniature.model, miniature.clip, name, strength, clip_strength)
    return miniature._replace(model=model, clip=clip)


def model_only(miniature, name, strength, _=None):
    import nodes

    return miniature._replace(
        model=nodes.LoraLoaderModelOnly().load_lora_model_only(miniature.model, name, strength)[0]
    )


def others_loader(miniature, name, strength, clip_strength):
    """As stackers of other packs load a row."""
    import comfy.sd
    import comfy.utils
    import folder_paths

    tensors = comfy.utils.load_torch_file(folder_paths.get_full_path("loras", name), safe_load=True)
    model, clip = comfy.sd.load_lora_for_models(miniature.model, miniature.clip, tensors, strength, clip_strength)
    return miniature._replace(model=model, clip=clip)


def seen(patcher) -> dict:
    return {key: [tuple(map(id, entry)) for entry in entries] for key, entries in patcher.patches.items()}


def of_loaders(pack, loaded, **changed):
    """Zip LoRAs behind loaders, no file chosen in it; what came in is as it was."""
    before = seen(loaded.model), loaded.model.patches_uuid, seen(loaded.clip.patcher), loaded.clip.patcher.patches_uuid
    with torch.inference_mode():
        ours = zipped_by(pack, loaded, **{**given(NO_FILE, NO_FILE), "quality": "fast", **changed})
    assert before == (
        seen(loaded.model), loaded.model.patches_uuid, seen(loaded.clip.patcher), loaded.clip.patcher.patches_uuid
    )  # fmt: skip
    return ours


def by_name(pack, miniature, rows, **changed):
    with torch.inference_mode():
        zipped = zipped_by(
            pack, miniature, **{**given(NO_FILE, NO_FILE), "quality": "fast", "lora_stack": rows, **changed}
        )
    return zipped.args


@pytest.mark.parametrize("load", [loader, others_loader], ids=["Load LoRA", "a stacker"])
def test_a_chain_of_two_is_the_files_by_name(pack, miniature, folder, load):  # noqa: F811
    rows = [(FILES[0], 0.9, 0.6), (FILES[1], 1.1, 1.1)]
    words = {"subject_prompt": WORDS[NAMES[0]], "style_prompt": WORDS[NAMES[1]], "quality": "balanced"}
    loaded = miniature
    for row in rows:
        loaded = load(loaded, *row)
    ours = of_loaders(pack, loaded, **words)
    lines = "\n".join(WORDS[name] for name in NAMES[:2])
    assert_same(ours, by_name(pack, miniature, rows, quality="balanced", stack_prompts=lines), miniature)
    captured = [line.rpartition(" (")[0] for line in ours.args[3].split("  \n") if line.startswith("taken off")]
    assert captured == [
        f"taken off the model: '{FILES[0]}' at 0.9, text encoder 0.6", f"taken off the model: '{FILES[1]}' at 1.1"
    ]  # fmt: skip
    assert "at 1.1 (56 layers)" in ours.args[3]
    assert f"prompt used for style: '{WORDS[NAMES[1]]}'" in ours.args[3]
    assert pack.nodes.bridge.saved.save(ours.args[2], "captured")


def test_a_chain_of_three_in_its_order(pack, miniature, folder):  # noqa: F811
    """Two of whose files have the very same names and shapes; one for the model alone, one twice."""
    loaded = model_only(loader(miniature, FILES[2], 0.25, 0.25), FILES[0], 0.8)
    loaded = loader(loader(loaded, FILES[1], 1.0, 1.0), FILES[2], 0.5, 0.5)
    rows = [(FILES[2], 0.75, 0.75), (FILES[0], 0.8, 0.0), (FILES[1], 1.0, 1.0)]
    assert_same(of_loaders(pack, loaded), by_name(pack, miniature, rows), miniature)


def test_a_lora_of_few_steps_stays_on_the_model(pack, miniature, folder):  # noqa: F811
    """Wherever in the chain its loader is."""
    fast = "Hyper-SDXL-8steps-lora.safetensors"
    (folder / FILES[2]).rename(folder / fast)
    rows = [(FILES[0], 0.9, 0.9), (FILES[1], 1.1, 1.1)]
    below = model_only(miniature, fast, 0.5)
    expected = by_name(pack, below, rows)
    for loaded in (
        loader(loader(below, *rows[0]), *rows[1]),
        model_only(loader(loader(miniature, *rows[0]), *rows[1]), fast, 0.5),
    ):
        ours = of_loaders(pack, loaded)
        assert_same(ours, expected, miniature)
        assert f"stays on the model, which draws in few steps by it: '{fast}'" in ours.args[3]
        assert "other patches stay" not in ours.args[3]


def test_stacked_is_the_chain(pack, miniature, folder):  # noqa: F811
    loaded = loader(loader(miniature, FILES[0], 0.9, 0.6), FILES[1], 1.1, 1.1)
    model, clip, *_ = of_loaders(pack, loaded, quality="stacked").args
    assert largest_difference(weights(model), weights(loaded.model)) == 0
    tokens = clip.tokenize(DRAWN)
    assert torch.equal(clip.encode_from_tokens(tokens), loaded.clip.encode_from_tokens(tokens))


def test_a_text_encoder_without_loaders_stays_without(pack, miniature, folder):  # noqa: F811
    loaded = loader(loader(miniature, FILES[0], 0.9, 0.9), FILES[1], 1.1, 1.1)._replace(clip=miniature.clip)
    rows = [(FILES[0], 0.9, 0.0), (FILES[1], 1.1, 0.0)]
    theirs = by_name(pack, miniature, rows)
    ours = of_loaders(pack, loaded)
    assert largest_difference(weights(ours.args[0]), weights(theirs[0])) == 0
    tokens = miniature.clip.tokenize(DRAWN)
    assert torch.equal(ours.args[1].encode_from_tokens(tokens), miniature.clip.encode_from_tokens(tokens))


def test_differences_and_other_kinds_of_updates_are_taken_too(pack, miniature, folder):  # noqa: F811
    """Biases and norms of a file, which name no file themselves, and what is not of low rank."""
    weight = miniature.model.model.state_dict()
    name = "diffusion_model.middle_block.1.proj_in"
    layer = "lora_unet_" + name.removeprefix("diffusion_model.").replace(".", "_")
    out, columns = weight[f"{name}.weight"].shape[:2]
    g = torch.Generator().manual_seed(0)
    loha = {f"{layer}.hada_{part}": torch.randn(*shape, generator=g) * 0.3 for part, shape in
            (("w1_a", (out, 2)), ("w1_b", (2, columns)), ("w2_a", (out, 2)), ("w2_b", (2, columns)))}  # fmt: skip
    tensors = load_file(folder / FILES[0])
    other = next(k for k in tensors if k.endswith("lora_up.weight") and layer not in k and "to_out" in k)
    loha[other.replace("lora_up.weight", "diff_b")] = torch.full((tensors[other].shape[0],), 0.01)
    loha |= {k: v for k, v in tensors.items() if layer not in k and not k.startswith("lora_te")}
    save_file(loha, folder / "loha.safetensors")
    rows = [("loha.safetensors", 0.7, 0.0), (FILES[1], 1.0, 1.0)]
    loaded = loader(model_only(miniature, *rows[0]), *rows[1])
    ours, theirs = of_loaders(pack, loaded), by_name(pack, miniature, rows)
    found = weights(ours.args[0])
    assert largest_difference(found, weights(theirs[0])) == 0
    bias = other.removeprefix("lora_unet_").removesuffix(".lora_up.weight")
    key = next(k for k in found if k.removesuffix(".bias").replace(".", "_") == bias)
    assert (found[key] - weights(miniature.model)[key]).abs().max() > 1e-3
    assert "other patches stay" not in ours.args[3]


def test_what_is_no_lora_stays_on_the_model(pack, miniature, folder):  # noqa: F811
    name = "diffusion_model.middle_block.1.proj_in.weight"
    patch = {name: ("diff", (torch.full_like(miniature.model.model.state_dict()[name], 0.02),))}
    changed = miniature._replace(model=miniature.model.clone())
    changed.model.add_patches(patch)
    rows = [(FILES[0], 0.9, 0.9), (FILES[1], 1.1, 1.1)]
    ours = of_loaders(pack, loader(loader(changed, *rows[0]), *rows[1]))
    assert_same(ours, by_name(pack, changed, rows), miniature)
    assert "1 other patches stay on the model: no LoRA file was recognized in them" in ours.args[3]


def test_what_cannot_be_captured_is_refused_in_a_sentence(pack, miniature, load_miniature, folder):  # noqa: F811
    def refused(loaded, says: str, **changed) -> None:
        with pytest.raises(ValueError, match=says):
            of_loaders(pack, loaded, **changed)

    one = loader(miniature, FILES[0], 1.0, 1.0)
    refused(miniature, r"^subject_lora and style_lora are \[None\], and no LoRA is on the model.*put a loader for each")
    refused(one, rf"and '{FILES[0]}' alone is on the model")
    two = loader(one, FILES[1], 1.0, 1.0)
    blocks = two._replace(model=two.model.clone())
    key = next(iter(blocks.model.patches))
    blocks.model.patches[key][0] = (0.5, *blocks.model.patches[key][0][1:])
    refused(blocks, rf"'{FILES[0]}' is on the model at several strengths, as by block weights")
    merged = two._replace(model=two.model.clone())
    merged.model.add_patches(load_miniature().model.get_key_patches("diffusion_model."), 0.5, 0.5)
    refused(merged, "another model was merged in after")
    merged_first = miniature.model.clone()
    merged_first.add_patches(load_miniature().model.get_key_patches("diffusion_model."), 0.5, 0.5)
    behind = loader(loader(miniature._replace(model=merged_first), FILES[0], 1.0, 1.0), FILES[1], 1.0, 1.0)
    assert of_loaders(pack, behind) is not None
    (folder / file(f"te_{NAMES[1]}")).unlink()  # the same on a model
    tensors = load_file(folder / FILES[1])
    name = next(key for key in tensors if key.endswith("lora_down.weight"))
    tensors[name][0, 0] += 1
    save_file(tensors, folder / "new.safetensors")
    (folder / "new.safetensors").replace(folder / FILES[1])  # what was loaded is a map of the old file
    fresh = two._replace(model=two.model.clone())
    refused(fresh, r"LoRA 2 on the model \(56 layers\) is that of no file in the loras folder as it is now")
    (folder / FILES[1]).unlink()
    refused(two._replace(model=two.model.clone()), "LoRA 2 on the model")


def test_a_lora_on_only_some_layers_is_refused(pack, miniature, folder):  # noqa: F811
    """As packs for block weights leave out those at strength 0: the file by name would be more than what is drawn."""
    import comfy.lora

    two = loader(loader(miniature, FILES[0], 0.9, 0.6), FILES[1], 1.0, 1.0)
    tensors = load_file(folder / FILES[0])
    names = comfy.lora.model_lora_keys_unet(miniature.model.model, {})
    names = comfy.lora.model_lora_keys_clip(miniature.clip.cond_stage_model, names)
    made = comfy.lora.load_lora(tensors, names, log_missing=False)
    on_model = miniature.model.model.state_dict().keys()

    def behind_block_weights(left_out: str):
        model, clip = miniature.model.clone(), miniature.clip.clone()
        some = {key: patch for key, patch in made.items() if left_out not in key}
        model.add_patches(some, 0.9)
        clip.add_patches(some, 0.6)
        return loader(miniature._replace(model=model, clip=clip), FILES[1], 1.0, 1.0), made.keys() - some.keys()

    whole, none = behind_block_weights("no layer")
    assert not none and largest_difference(weights(of_loaders(pack, whole).args[0]), weights(two.model)) < 1
    for part, where in (("input_blocks", "model"), ("layers.0.", "text encoder")):
        loaded, without = behind_block_weights(part)
        of_this = [key for key in made if (key in on_model) == (where == "model")]
        says = f"^only {len(of_this) - len(without)} of {len(of_this)} layers of '{FILES[0]}' are on the {where}"
        assert without and without < set(of_this)
        with pytest.raises(ValueError, match=says):
            of_loaders(pack, loaded)


@pytest.mark.parametrize("matrices", [True, False], ids=["beside matrices", "alone"])
def test_differences_of_a_text_encoder_are_taken_too(pack, miniature, folder, matrices):  # noqa: F811
    """They name no file themselves; left there, the zip would bring them a second time."""
    tensors = load_file(folder / FILES[0])
    parts = [key for key in tensors if key.startswith("lora_te")]
    name = next(key for key in parts if key.endswith("lora_up.weight")).removesuffix(".lora_up.weight")
    shape = tensors[f"{name}.lora_up.weight"].shape[0], tensors[f"{name}.lora_down.weight"].shape[1]
    tensors = {k: t for k, t in tensors.items() if not k.startswith(name) and (matrices or k not in parts)}
    g = torch.Generator().manual_seed(0)
    tensors[f"{name}.diff"] = torch.randn(shape, generator=g) * 0.05
    save_file(tensors, folder / "diff.safetensors")
    rows = [("diff.safetensors", 0.9, 0.6), (FILES[1], 1.1, 1.1)]
    loaded = loader(loader(miniature, *rows[0]), *rows[1])
    ours = of_loaders(pack, loaded)
    assert_same(ours, by_name(pack, miniature, rows), miniature)
    assert "'diff.safetensors' at 0.9, text encoder 0.6" in ours.args[3]


def test_a_call_that_was_put_on_again_counts_again(pack, miniature, folder):  # noqa: F811
    once = loader(miniature, FILES[0], 0.5, 0.5)
    twice = once._replace(model=once.model.clone(), clip=once.clip.clone())
    for patcher in (twice.model, twice.clip.patcher):
        patcher.patches = {key: [*on, *((0.25, *entry[1:]) for entry in on)] for key, on in patcher.patches.items()}
    rows = [(FILES[0], 0.75, 0.75), (FILES[1], 1.0, 1.0)]
    assert_same(of_loaders(pack, loader(twice, *rows[1])), by_name(pack, miniature, rows), miniature)


def test_a_chain_is_looked_for_anew_when_a_file_changes(pack, miniature, folder):  # noqa: F811
    two = loader(loader(miniature, FILES[0], 1.0, 1.0), FILES[1], 1.0, 1.0)
    find = pack.nodes.bridge.lora.captured.find
    chain = find(two.model, two.clip)
    assert find(two.model, two.clip) is chain
    tensors = load_file(folder / FILES[1])
    (folder / file(f"te_{NAMES[1]}")).unlink()
    name = next(key for key in tensors if key.endswith("lora_down.weight"))
    tensors[name][0, 0] += 1
    save_file(tensors, folder / "new.safetensors")
    (folder / "new.safetensors").replace(folder / FILES[1])  # what was loaded is a map of the old file
    with pytest.raises(ValueError, match="LoRA 2 on the model"):
        find(two.model, two.clip)
    (folder / FILES[1]).unlink()
    with pytest.raises(ValueError, match="LoRA 2 on the model"):
        find(two.model, two.clip)


def test_the_folder_is_gone_through_once_and_what_was_found_comes_first(pack, miniature, folder, monkeypatch):  # noqa: F811
    captured = pack.nodes.bridge.lora.captured
    monkeypatch.setattr(captured, "_recent", {})
    for number in range(5):
        save_file({"x.lora_up.weight": torch.zeros(1, 1)}, folder / f"aa{number}.safetensors")
    opened, looked = captured.opened, []
    monkeypatch.setattr(captured, "opened", lambda path: looked.append(str(path)) or opened(path))
    rows = [(name, 1.0, 1.0) for name in FILES]

    def chain(times: float):
        loaded = miniature
        for name, *strengths in rows:
            loaded = loader(loaded, name, *(times * strength for strength in strengths))
        looked.clear()
        found = captured.find(loaded.model, loaded.clip)
        assert [lora.name for lora in found.loras] == FILES
        return len(looked)

    first = chain(1.0)
    assert first == len(set(looked)) > 5
    assert chain(0.5) == len(FILES)
    monkeypatch.setattr(captured, "_MOST_RECENT", 2)
    chain(0.25)
    assert len(captured._recent) == 2


def test_an_alpha_that_only_this_pack_reads_is_refused_for_what_it_is(pack, miniature, folder):  # noqa: F811
    """The loader drew the LoRA at scale 1; by its configuration it counts half."""
    import json

    import folder_paths

    own = folder / "own"
    own.mkdir()
    tensors = {k: t for k, t in load_file(folder / file(NAMES[0])).items() if not k.endswith(".alpha")}
    rank = next(t.shape[0] for k, t in tensors.items() if k.endswith("lora_down.weight"))
    save_file(tensors, own / "adapter_model.safetensors")
    folder_paths.filename_list_cache.clear()
    name = next(n for n in folder_paths.get_filename_list("loras") if n.endswith("adapter_model.safetensors"))
    two = loader(loader(miniature, name, 1.0, 1.0), FILES[1], 1.0, 1.0)
    assert of_loaders(pack, two) is not None
    (own / "adapter_config.json").write_text(json.dumps({"r": rank, "lora_alpha": rank / 2}))
    assert pack.nodes.bridge.lora.loras.load(name, 1.0).config
    with pytest.raises(ValueError, match=rf"'{name}' has its alpha in its header or .*at scale 1.*choose its file in"):
        of_loaders(pack, two)


def test_names_that_the_loader_converts_are_found(pack, miniature, folder):  # noqa: F811
    """As of Wan Fun's files: the host knows them by one of their tensors."""
    tensors = load_file(folder / file(NAMES[0]))
    converted = {key.replace("lora_unet_", "lora_unet__"): tensor for key, tensor in tensors.items()}
    for part in ("down", "up"):
        converted[f"lora_unet__blocks_0_cross_attn_k.lora_{part}.weight"] = torch.ones(1, 1)
    save_file(converted, folder / "fun.safetensors")
    (folder / file(NAMES[0])).unlink()
    (folder / FILES[0]).unlink()
    two = loader(loader(miniature, "fun.safetensors", 0.9, 0.9), FILES[1], 1.0, 1.0)
    captured = pack.nodes.bridge.lora.captured.find(two.model, two.clip)
    assert [lora.name for lora in captured.loras] == ["fun.safetensors", FILES[1]]
    rows = [("fun.safetensors", 0.9, 0.9), (FILES[1], 1.0, 1.0)]
    ours, theirs = of_loaders(pack, two).args[0], by_name(pack, miniature, rows)[0]
    assert largest_difference(weights(ours), weights(theirs)) == 0


def test_a_zip_of_a_chain_is_not_put_on_it_once_more(pack, miniature, folder):  # noqa: F811
    """Apply Zipped LoRA and Compare Merges take the model from before the loaders."""
    loaded = loader(loader(miniature, FILES[0], 0.9, 0.9), FILES[1], 1.1, 1.1)
    zipped = of_loaders(pack, loaded).args[2]
    apply, compare = pack.nodes.ApplyZippedLoRA.execute, pack.nodes.bridge.compare.compare
    says = rf"has '{FILES[0]}' and '{FILES[1]}' on it already.*connect the model and the clip from before these loaders"
    drawing = {"seed": 0, "steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal"}
    drawing |= {"width": 64, "height": 64}
    one = loader(miniature, FILES[1], -0.3, 0.0)
    with torch.inference_mode():
        for model, clip in ((loaded.model, None), (loaded.model, miniature.clip), (loaded.model, loaded.clip)):
            with pytest.raises(ValueError, match=says):
                apply(model, zipped, 1.0, clip)
            with pytest.raises(ValueError, match=says):
                compare(model, clip or miniature.clip, miniature.vae, zipped, "a", "", "1", **drawing)
        assert apply(one.model, zipped, 1.0).args[0].patches, "one of them may be meant: a little more of it"
        other = loader(miniature, FILES[2], 1.0, 1.0)
        assert apply(other.model, zipped, 1.0, other.clip).args[0].patches
        on = apply(miniature.model, zipped, 1.0, miniature.clip).args
        assert largest_difference(weights(on[0]), weights(of_loaders(pack, loaded).args[0])) == 0


def test_a_number_in_the_place_of_a_model_is_refused_in_a_sentence(pack, miniature, folder):  # noqa: F811
    inputs = {**given(NO_FILE, NO_FILE), "clip": miniature.clip}
    with pytest.raises(ValueError, match="^model is not connected"):
        pack.nodes.ZipLoRAs.check_lazy_status(**inputs, model=5)


def test_prompts_and_pictures_are_asked_for_when_the_chain_is_known(pack, miniature, folder):  # noqa: F811
    node = pack.nodes.ZipLoRAs
    inputs = {**given(NO_FILE, NO_FILE), "subject_images": None, "vae": None}
    assert node.check_lazy_status(**inputs, model=None, clip=None) == ["model", "clip"]
    assert node.check_lazy_status(**inputs, model=miniature.model, clip=None) == ["clip"]
    loaded = loader(loader(miniature, FILES[0], 1.0, 1.0), FILES[1], 1.0, 1.0)
    made = {"model": loaded.model, "clip": loaded.clip}
    with pytest.raises(
        ValueError, match=f"subject_prompt for '{FILES[0]}' and style_prompt for '{FILES[1]}' are empty"
    ):
        node.check_lazy_status(**inputs, **made)
    inputs |= {"subject_prompt": "a", "style_prompt": "b"}
    assert node.check_lazy_status(**inputs, **made) == ["subject_images", "vae"]
    assert node.validate_inputs(NO_FILE, NO_FILE) is True
