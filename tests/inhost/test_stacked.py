"""A pair that nothing has zipped, and Zip LoRAs that is bypassed, are the host's own LoRA loaders in a row."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_apply import largest_difference, weights
from test_zip import DRAWN, NAMES, expert, file, folder, given, taught  # noqa: F401 (folder: a fixture)

FILES = [file(f"te_{name}") for name in NAMES]


def loaders(miniature, *rows):
    """Load LoRA, once for each (file, strength, text encoder's strength)."""
    import nodes

    model, clip = miniature.model, miniature.clip
    for row in rows:
        model, clip = nodes.LoraLoader().load_lora(model, clip, *row)
    return model, clip


def seen(model, clip) -> tuple[dict, torch.Tensor]:
    return weights(model), clip.encode_from_tokens(clip.tokenize(DRAWN))


def assert_same(ours, theirs, miniature) -> None:
    found, expected, bare = seen(*ours), seen(*theirs), seen(miniature.model, miniature.clip)
    assert largest_difference(found[0], expected[0]) == 0 and torch.equal(found[1], expected[1])
    assert largest_difference(found[0], bare[0]) > 1e-3 and not torch.equal(found[1], bare[1])


def test_a_pair_on_a_model_is_two_loaders(pack, miniature, folder):  # noqa: F811
    """Also with dials in between, which turn its strengths, and with a strength of the whole."""
    nodes = pack.nodes
    pair = nodes.LoadLoRAPair.execute(*FILES[:2], 0.9, 1.1).args[0]
    with torch.inference_mode():
        before = seen(miniature.model, miniature.clip)
        ours = nodes.ApplyZippedLoRA.execute(miniature.model, pair, 1.0, miniature.clip).args
        assert_same(ours, loaders(miniature, (FILES[0], 0.9, 0.9), (FILES[1], 1.1, 1.1)), miniature)
        dialled = nodes.StyleStrength.execute(pair, 0.5, 1.0).args[0]
        dialled = nodes.ConceptStrengths.execute(dialled, "subject: 2").args[0]
        ours = nodes.ApplyZippedLoRA.execute(miniature.model, dialled, 0.5, miniature.clip).args
        assert_same(ours, loaders(miniature, (FILES[0], 0.9, 0.9), (FILES[1], 0.275, 0.275)), miniature)
        after = seen(miniature.model, miniature.clip)
    assert largest_difference(before[0], after[0]) == 0 and torch.equal(before[1], after[1])


def test_a_stack_on_a_model_is_its_loaders(pack, miniature, folder):  # noqa: F811
    rows = [(FILES[2], 0.5, 0.2), (FILES[0], 0.0, 0.7), (FILES[1], -0.4, 0.0)]
    sources = pack.nodes.LoadLoRAStack.execute(rows, "style, other, subject").args[0]
    in_order = [rows[2], rows[0], rows[1]]
    with torch.inference_mode():
        ours = pack.nodes.ApplyZippedLoRA.execute(miniature.model, sources, 1.0, miniature.clip).args
        assert_same(ours, loaders(miniature, *in_order), miniature)


def test_zip_loras_stacked_is_two_loaders(pack, miniature, folder):  # noqa: F811
    """Without prompts or pictures; what it hands on can be dialled, saved and applied as any merge."""
    node = pack.nodes.ZipLoRAs
    inputs = given(*FILES[:2], quality="stacked", subject_strength=0.9, style_strength=1.1)
    assert node.check_lazy_status(**inputs, model=None, clip=None, vae=None) == ["model", "clip"]
    theirs = loaders(miniature, (FILES[0], 0.9, 0.9), (FILES[1], 1.1, 1.1))
    with torch.inference_mode():
        model, clip, zipped, report = node.execute(miniature.model, miniature.clip, **inputs).args
        assert_same((model, clip), theirs, miniature)
        again = pack.nodes.ApplyZippedLoRA.execute(miniature.model, zipped, 1.0, miniature.clip).args
        assert largest_difference(weights(again[0]), weights(theirs[0])) < 2e-6
    assert report.startswith("Plain stacking, as LoRA loaders in a row do it.") and zipped.method == "sum"


def test_layers_that_the_hosts_loader_skips_are_stacked_too(pack, miniature, folder):  # noqa: F811
    """Of files with diffusers' names: a comparison with the bare model would flatter the zip."""
    import comfy.lora
    import comfy.utils

    tensors = load_file(folder / file("octopus"))
    names = comfy.utils.unet_to_diffusers(miniature.model.model.model_config.unet_config)
    kohyas = {f"lora_unet_{v.removesuffix('.weight').replace('.', '_')}": k for k, v in names.items()}
    renamed = {}
    for key, tensor in tensors.items():
        layer, _, rest = key.partition(".")
        if layer in kohyas and "attn" in layer:
            ending = {"lora_up.weight": "lora_B.weight", "lora_down.weight": "lora_A.weight"}.get(rest)
            if ending:
                scale = tensors.get(f"{layer}.alpha", torch.tensor(1.0)) / tensors[f"{layer}.lora_down.weight"].shape[0]
                value = tensor * scale.to(tensor.dtype) if ending == "lora_B.weight" else tensor
                renamed[f"unet.{kohyas[layer].removesuffix('.weight')}.{ending}"] = value.contiguous()
    assert renamed
    hosts = comfy.lora.model_lora_keys_unet(miniature.model.model, {})
    assert not comfy.lora.load_lora(dict(renamed), hosts, log_missing=False)
    save_file(renamed, folder / "peft.safetensors")
    pair = pack.nodes.LoadLoRAPair.execute("peft.safetensors", FILES[1], 1.0, 1.0).args[0]
    with torch.inference_mode():
        ours = pack.nodes.ApplyZippedLoRA.execute(miniature.model, pair, 1.0, miniature.clip).args[0]
        sum_of_both = pack.nodes.DirectMergeLoRA.execute(miniature.model, pair, "sum").args[0]
        other = pack.nodes.ApplyZippedLoRA.execute(miniature.model, sum_of_both, 1.0, miniature.clip).args[0]
        style = loaders(miniature, (FILES[1], 1.0, 1.0))[0]
    found = weights(ours)
    assert largest_difference(found, weights(other)) < 2e-6 and largest_difference(found, weights(style)) > 1e-3


@pytest.mark.parametrize("kind", ["LoHa", "OFT"])
def test_what_the_hosts_loader_reads_whole_is_stacked_without_computing_it(pack, miniature, folder, kind, monkeypatch):  # noqa: F811
    """An update of such a file takes seconds and gigabytes on a large model, and its loader needs none."""
    name = "diffusion_model.middle_block.1.proj_in"
    layer = "lora_unet_" + name.removeprefix("diffusion_model.").replace(".", "_")
    out, columns = miniature.model.model.state_dict()[f"{name}.weight"].shape[:2]
    g = torch.Generator().manual_seed(0)
    shapes = {"hada_w1_a": (out, 2), "hada_w1_b": (2, columns), "hada_w2_a": (out, 2), "hada_w2_b": (2, columns)}
    shapes = shapes if kind == "LoHa" else {"oft_blocks": (4, out // 4, out // 4)}
    made = {f"{layer}.{part}": torch.randn(*shape, generator=g) * 0.3 for part, shape in shapes.items()}
    kept = load_file(folder / FILES[0])
    save_file({**{k: t for k, t in kept.items() if layer not in k}, **made}, folder / "dense.safetensors")
    fitting = pack.nodes.bridge.lora.fitting
    monkeypatch.setattr(fitting.Fitting, "_dense", lambda *given: pytest.fail("an update was computed"))
    pair = pack.nodes.LoadLoRAPair.execute("dense.safetensors", FILES[1], 0.9, 1.1).args[0]
    with torch.inference_mode():
        ours = pack.nodes.ApplyZippedLoRA.execute(miniature.model, pair, 1.0, miniature.clip).args
        assert_same(ours, loaders(miniature, ("dense.safetensors", 0.9, 0.9), (FILES[1], 1.1, 1.1)), miniature)


def test_another_models_file_is_not_stacked(pack, miniature, folder):  # noqa: F811
    """The host only logs what it cannot put on."""
    tensors = load_file(folder / FILES[0])
    up = next(k for k in tensors if k.endswith("lora_up.weight") and k.startswith("lora_unet"))
    larger = {**tensors, up: torch.randn(tensors[up].shape[0] + 1, tensors[up].shape[1])}
    strange = {f"lora_unet_strange_{part}.weight": torch.ones(2, 2) for part in ("a.lora_up", "a.lora_down")}
    for name, made in (("larger", larger), ("strange", strange)):
        save_file(made, folder / file(name))
        pair = pack.nodes.LoadLoRAPair.execute(file(name), FILES[1], 1.0, 1.0).args[0]
        with pytest.raises(ValueError, match=f"'{name}.safetensors' (was made for another|has no layer that fits)"):
            pack.nodes.ApplyZippedLoRA.execute(miniature.model, pair, 1.0)


def test_a_zipped_pair_is_zipped_anew_at_its_dials(pack, miniature, folder, monkeypatch):  # noqa: F811
    nodes = pack.nodes
    monkeypatch.setattr(nodes.bridge.drawing.recipes, "STEPS", 2)
    pair = nodes.LoadLoRAPair.execute(*FILES[:2], 0.8, 1.0).args[0]
    with torch.inference_mode():
        merged = nodes.DirectMergeLoRA.execute(miniature.model, pair, "shared columns").args[0]
        dialled = nodes.StyleStrength.execute(merged, 0.5, 1.0).args[0]
        prompts = [taught(miniature, FILES[0], "a", 0.8), taught(miniature, FILES[1], "b", 0.5)]
        expected = nodes.LoadLoRAPair.execute(*FILES[:2], 0.8, 0.5).args[0]
        (_, _, ours, _), (_, _, theirs, _) = (
            expert(pack, miniature, sources, prompts, (None, None)) for sources in (dialled, expected)
        )
    for concept, of in theirs.coefficients.by_concept.items():
        assert of and all(torch.equal(ours.coefficients[concept][name], m) for name, m in of.items())
    assert {c: s.strength for c, s in ours.sources.by_concept.items()} == {"content": 0.8, "style": 0.5}
    assert merged.sources is nodes.bridge.lora.zipped.sources_of(merged)


def test_compare_merges_takes_a_pair(pack, miniature, folder, monkeypatch):  # noqa: F811
    compare = pack.nodes.bridge.compare
    pair, seen_by = pack.nodes.LoadLoRAPair.execute(*FILES[:2], 1.0, 1.0).args[0], []
    monkeypatch.setattr(compare, "columns", lambda zipped, dials: seen_by.append((zipped.method, dials)) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pack.nodes.CompareMerges.execute(miniature.model, miniature.clip, miniature.vae, pair, "a", "", "1", 0, 1, 1.0)
    assert seen_by == [("sum", [1.0])]


def test_a_pair_of_another_model_is_refused(pack, miniature, folder):  # noqa: F811
    alien = {f"lora_unet_down_blocks_9_proj.lora_{which}.weight": torch.zeros(1, 1) for which in ("up", "down")}
    save_file(alien, folder / "alien.safetensors")
    pair = pack.nodes.LoadLoRAPair.execute("alien.safetensors", FILES[1], 1.0, 1.0).args[0]
    with pytest.raises(ValueError, match="'alien.safetensors' has no layer that fits this model"):
        pack.nodes.ApplyZippedLoRA.execute(miniature.model, pair, 1.0)
