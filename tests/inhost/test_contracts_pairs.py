"""Pairs and what they are fitted to: strengths, models, kinds of updates, refusals."""

from __future__ import annotations

import logging
import math
import os
import re
from dataclasses import replace

import pytest
import tiny
import torch
from safetensors.torch import save_file
from test_apply import largest_difference, stock, weights, zip_pair
from test_contracts_host import zip_
from test_dense_formats import written
from test_formats import as_sources


@pytest.fixture(scope="module")
def patcher():
    return tiny.tiny_patcher()


def attention(patcher, rank: int, seed: int):
    return tiny.full_size.attention_lora(patcher.model, rank, seed, torch.float32)


def test_a_pair_of_sockets_keeps_order_and_strengths(pack, patcher):
    first, second = attention(patcher, 2, 1), attention(patcher, 3, 2)
    pair = pack.nodes.bridge.lora.loras.pair(first, second, 0.3, 0.7)
    assert (pair["content"].strength, pair["style"].strength) == (0.3, 0.7)
    tensors = pair["content"].tensors
    assert tensors.keys() == first.keys() and all(tensors[k] is t for k, t in first.items())
    fitted = pack.nodes.bridge.lora.fitting.fit(pair, patcher.model).loras
    assert {f.rank for layer in fitted.layers.values() for c, f in layer.items() if c == "style"} == {3}
    assert {f.scale for layer in fitted.layers.values() for c, f in layer.items() if c == "content"} == {0.3}


@pytest.mark.parametrize("name", ["content", "style"])
@pytest.mark.parametrize("strength", [math.nan, math.inf, 101.0])
def test_strengths_out_of_range_are_named(pack, patcher, name, strength):
    given = {"content_strength": 1.0, "style_strength": 1.0, f"{name}_strength": strength}
    lora = attention(patcher, 2, 1)
    with pytest.raises(ValueError, match=f"{name}_strength is "):
        pack.nodes.bridge.lora.loras.pair(lora, lora, **given)


def test_tensors_of_other_nodes_are_checked_as_files_are(pack, patcher):
    lora = attention(patcher, 2, 1)
    broken = {**lora, next(iter(lora)): torch.full((3, 3), math.nan)}
    with pytest.raises(ValueError, match="style_lora"):
        pack.nodes.bridge.lora.loras.pair(lora, broken, 1.0, 1.0)


@pytest.mark.parametrize("strength", [math.nan, 101.0, -1e9])
def test_a_zipped_pair_at_no_strength_of_use_is_refused(pack, patcher, strength):
    zipped = zip_pair(pack, patcher, tiny.sources(pack, patcher.model))
    with pytest.raises(ValueError, match="strength is "):
        pack.nodes.bridge.apply.apply(patcher, None, zipped, strength)


def with_everything(patcher, seed: int):
    """DoRA on some layers, an ordinary LoRA on others, a bias difference: of which strengths act differently."""
    g = torch.Generator().manual_seed(seed)
    plain = {k: t for k, t in attention(patcher, 3, seed).items() if "to_out" not in k}
    return {**plain, **written(patcher.model, "linear", "DoRA"), "lora_unet_out_2.diff_b": torch.randn(4, generator=g)}


def test_one_pair_on_two_models_is_each_models_own(pack, patcher):
    """A DoRA's update depends on the model's weights; both strengths, and the whole's, are as with two loaders."""
    other = tiny.tiny_patcher()
    with torch.inference_mode():
        for parameter in other.model.parameters():
            parameter.mul_(1.5)
    files = with_everything(patcher, 1), attention(patcher, 2, 2) | {"lora_unet_out_2.diff_b": torch.ones(4)}
    sources = as_sources(pack, *files)
    strong = (replace(sources[c], strength=s) for c, s in (("content", 0.6), ("style", 1.2)))
    sources = replace(sources, by_concept=tiny.of_two(*strong))
    for model in (patcher, other, patcher):
        fitted = pack.nodes.bridge.lora.fitting.fit(sources, model.model)
        ones = pack.ziplora_core.coefficients.Coefficients.ones(fitted.loras)
        zipped = pack.nodes.bridge.lora.zipped.ZippedLoRA(sources, fitted, ones)
        bare, ours = weights(model), weights(pack.nodes.bridge.apply.apply(model, None, zipped, 1.0)[0])
        theirs = weights(stock(stock(model, files[0], 0.6), files[1], 1.2))
        assert largest_difference(theirs, bare) > 0.01
        assert largest_difference(ours, theirs) < 1e-4


def test_whole_strength_dials_and_coefficients_act_each_on_its_own(pack, patcher):
    """Coefficients that are the same for all columns are a strength: with two loaders, and bias differences too."""
    files = [
        attention(patcher, rank, rank) | {"lora_unet_out_2.diff_b": torch.full((4,), float(rank))} for rank in (2, 3)
    ]
    sources = as_sources(pack, *files)
    sources = replace(sources, by_concept={**sources.by_concept, "content": replace(sources["content"], strength=0.6)})
    zipped = zip_pair(pack, patcher, sources)
    zipped = replace(
        zipped,
        coefficients=zipped.coefficients.scaled(content=0.5, style=2.0),
        dials={"content": 0.5, "style": 2.0},
    )
    ours = weights(pack.nodes.bridge.apply.apply(patcher, None, zipped, 0.8)[0])
    theirs = weights(stock(stock(patcher, files[0], 0.8 * 0.6 * 0.5), files[1], 0.8 * 2.0))
    assert largest_difference(theirs, weights(patcher)) > 0.01
    assert largest_difference(ours, theirs) < 1e-4


def test_dials_belong_to_their_concept(pack, patcher):
    sources = tiny.sources(pack, patcher.model, strengths=(0.5, 2.0))
    zipped = replace(zip_pair(pack, patcher, sources), dials={"content": 0.25, "style": 1.5})
    assert zipped.strength("content") == pytest.approx(0.125) and zipped.strength("style") == pytest.approx(3.0)


def test_a_pair_on_a_model_without_its_layers_is_refused(pack, patcher):
    layers = dict(zip_pair(pack, patcher, tiny.sources(pack, patcher.model)).fitted.loras.layers)
    first = next(iter(layers))
    layers["diffusion_model.not.there.weight"] = layers.pop(first)
    zipped = zip_pair(pack, patcher, tiny.sources(pack, patcher.model))
    strange = replace(zipped.fitted.loras, layers=layers)
    ones = pack.ziplora_core.coefficients.Coefficients.ones(strange)
    zipped = replace(zipped, fitted=replace(zipped.fitted, loras=strange), coefficients=ones)
    with pytest.raises(ValueError, match="another model: 1 of .* 'diffusion_model.not.there.weight'"):
        pack.nodes.bridge.apply.apply(patcher, None, zipped, 1.0)


def test_text_encoder_parts_that_do_not_fit_are_left_out_aloud(pack, patcher, miniature, caplog):
    layer = "text_model_encoder_layers_0_mlp_fc1"
    lora = attention(patcher, 2, 1)
    key = next(
        k
        for k, t in miniature.clip.cond_stage_model.state_dict().items()
        if k.endswith("clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight")
    )
    out, columns = miniature.clip.cond_stage_model.state_dict()[key].shape
    lora[f"lora_te1_{layer}.lora_up.weight"] = torch.ones(out + 1, 2)
    lora[f"lora_te1_{layer}.lora_down.weight"] = torch.ones(2, columns)
    zipped = zip_pair(pack, patcher, as_sources(pack, lora, attention(patcher, 2, 2)))
    with caplog.at_level(logging.WARNING):
        _, clip = pack.nodes.bridge.apply.apply(patcher, miniature.clip, zipped, 1.0)
    assert clip.patcher.patches == {} and "'content'" in caplog.text and "1 text-encoder part" in caplog.text


def test_text_encoder_parts_follow_file_dial_and_whole(pack, patcher, miniature):
    layer = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    state = miniature.clip.cond_stage_model.state_dict()
    shape = next(
        t.shape for k, t in state.items() if k.endswith("clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight")
    )
    files = []
    for seed in (1, 2):
        up, down = torch.ones(shape[0], 1), torch.ones(1, shape[1])
        files.append({**attention(patcher, 2, seed), f"{layer}.lora_up.weight": up, f"{layer}.lora_down.weight": down})
    sources = as_sources(pack, *files)
    sources = replace(sources, by_concept={**sources.by_concept, "content": replace(sources["content"], strength=0.5)})
    zipped = replace(zip_pair(pack, patcher, sources), dials={"content": 0.5, "style": 0.0})
    _, clip = pack.nodes.bridge.apply.apply(patcher, miniature.clip, zipped, 0.5)
    ((strength, *_), *rest) = next(iter(clip.patcher.patches.values()))
    assert strength == pytest.approx(0.125) and [s for s, *_ in rest] in ([], [0.0])


def test_a_broken_update_and_what_fits_nothing_are_named(pack, patcher):
    good, n = attention(patcher, 2, 1), "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_out_0"
    plain = {k: t for k, t in good.items() if not k.startswith(n)}
    huge = {
        **plain,
        f"{n}.lora_up.weight": torch.full((64, 2), 1e30),
        f"{n}.lora_down.weight": torch.full((2, 64), 1e30),
    }
    cases = (
        ({**huge, f"{n}.dora_scale": torch.ones(1, 64)}, "NaN or infinite"),
        ({**plain, f"{n}.lora_up.weight": torch.ones(64, 2), f"{n}.lora_down.weight": torch.ones(2, 64),
          f"{n}.dora_scale": torch.ones(1, 63)}, "made for another model.*DoRA"),
        ({**plain, **{f"{n}.hada_w{i}_a": torch.ones(64, 3) for i in (1, 2)},
          **{f"{n}.hada_w{i}_b": torch.ones(4, 64) for i in (1, 2)}}, "made for another model.*LoHa"),
    )  # fmt: skip
    for file, says in cases:
        with pytest.raises(ValueError, match=says):
            pack.nodes.bridge.lora.fitting.fit(as_sources(pack, good, file), patcher.model)


def test_what_a_model_lacks_is_told_of_each_file(pack):
    """A layer that the host knows by name and this model was made without: its bias."""
    patcher = tiny.tiny_patcher()
    lora = attention(patcher, 2, 1)
    lora["lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q.diff_b"] = torch.ones(64)
    (note,) = pack.nodes.bridge.lora.fitting.fit(as_sources(pack, lora, attention(patcher, 2, 2)), patcher.model).notes
    assert note.startswith("1 tensors of 'content' fit no layer")


def test_parts_of_a_fused_weight_land_in_their_rows_and_add_up(pack):
    """Flux in diffusers' names: queries, keys and values of one weight, as the host's loader puts them."""
    from families import FAMILIES

    family = FAMILIES["Flux"]
    patcher, g = family.patcher(), torch.Generator().manual_seed(0)
    file = {}
    for part in ("to_q", "to_k", "to_v"):
        name = f"transformer.transformer_blocks.0.attn.{part}"
        file[f"{name}.lora_B.weight"] = torch.randn(64, 2, generator=g)
        file[f"{name}.lora_A.weight"] = torch.randn(2, 64, generator=g)
    sources = as_sources(pack, file, family.lora(patcher.model, 2, 2))
    zipped = zip_pair(pack, patcher, sources)
    ours = weights(pack.nodes.bridge.apply.apply(patcher, None, zipped, 1.0)[0])
    theirs = weights(stock(stock(patcher, file), sources["style"].tensors))
    assert largest_difference(theirs, weights(patcher)) > 0.01
    assert largest_difference(ours, theirs) < 1e-4


@pytest.mark.parametrize(
    ("width", "family"), [(768, "SD 1.5"), (1024, "SD 2"), (1280, "SDXL refiner"), (2048, "SDXL"), (5, None)]
)
def test_the_width_of_prompts_tells_unets_apart(pack, width, family):
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight"
    assert pack.ziplora_core.formats.looks_like({name: torch.zeros(2, width)}) == family


@pytest.mark.parametrize(
    "name",
    [
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
        "te2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
    ],
)
def test_text_encoder_parts_are_not_unused_layers(pack, patcher, name):
    lora = {**attention(patcher, 2, 1), name: torch.ones(2, 2)}
    assert (
        pack.nodes.bridge.lora.fitting.fit(as_sources(pack, lora, attention(patcher, 2, 2)), patcher.model).notes == []
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_one_lora_on_both_sockets_is_not_zipped(pack, patcher, dtype):
    """Also as two copies: what they hold is compared, as of two files. It may be merged by blocks, as B-LoRA's is."""
    bridge = pack.nodes.bridge
    lora = {k: t.to(dtype) for k, t in attention(patcher, 2, 1).items()}
    copied = {k: t.clone() for k, t in lora.items()}
    for other in (lora, copied):
        pair = bridge.lora.loras.pair(lora, other, 1.0, 0.5)
        for refuses in (
            lambda pair=pair: bridge.optimize.zipping.check_inputs(patcher, pair, {"content": None, "style": None}),
            lambda pair=pair: zip_(pack, patcher, sources=pair),
        ):
            with pytest.raises(ValueError, match="content_lora and style_lora hold the same LoRA"):
                refuses()
    name = next(key for key in copied if "lora_up" in key)
    copied[name] = copied[name].float().mul(2).to(dtype)
    bridge.lora.loras.refuse_one_lora(bridge.lora.loras.pair(lora, copied, 1.0, 0.5))


@pytest.mark.parametrize(("rank", "fits"), [(2, True), (3, False)])
def test_matrices_that_do_not_meet_are_refused_whatever_their_size(pack, rank, fits):
    """up (8, 2) and down (3, 5) have no product, though rows times columns are what a weight (8, 5) holds."""
    from comfy.weight_adapter import LoRAAdapter

    up, down = torch.ones(8, 2), torch.ones(rank, 5)
    patch = LoRAAdapter(set(), (up, down, 1.0, None, None, None))
    assert pack.nodes.bridge.lora.adapters.fits(patch, torch.Size((8, 5))) == fits


@pytest.mark.parametrize("names", ["kohya's", "peft's"])
def test_a_file_for_the_text_encoder_alone_is_named(pack, patcher, tmp_path, monkeypatch, names):
    """When queued, from its header, and by whatever puts a file on a model: it is no other family's."""
    import folder_paths

    layer, ends = {
        "kohya's": ("lora_te1_text_model_encoder_layers_0_mlp_fc1", ("lora_up.weight", "lora_down.weight")),
        "peft's": ("text_encoder.text_model.encoder.layers.0.mlp.fc1", ("lora_B.weight", "lora_A.weight")),
    }[names]
    alone = {f"{layer}.{ends[0]}": torch.ones(768, 2), f"{layer}.{ends[1]}": torch.ones(2, 768)}
    says = "' changes the text encoder alone, so there is nothing to zip; .* use ComfyUI's Load LoRA for this one"
    with pytest.raises(ValueError, match="'style" + says):
        pack.nodes.bridge.lora.fitting.fit(as_sources(pack, attention(patcher, 2, 1), alone), patcher.model)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    save_file(alone, tmp_path / "text.safetensors")
    save_file({**attention(patcher, 2, 1), **alone}, tmp_path / "both.safetensors")
    folder_paths.filename_list_cache.clear()
    said = pack.nodes.LoadLoRAPair.validate_inputs("both.safetensors", "text.safetensors")
    assert re.match("style_lora: 'text.safetensors" + says, said)
    assert pack.nodes.bridge.lora.loras.check("both.safetensors") is None


def without_numbers(monkeypatch, which: str) -> None:
    """A disk that gives its files no numbers, as cloud storage on Windows."""
    real = os.stat

    def stat(path, *given, **more):
        status = real(path, *given, **more)
        if which not in str(path):
            return status
        return os.stat_result([status[0], 0, 0, *status[3:]], {"st_mtime_ns": 1, "st_ctime_ns": 1})

    monkeypatch.setattr(os, "stat", stat)


@pytest.mark.parametrize("which", ["", "one.safetensors"], ids=["both", "one of them"])
def test_two_files_without_numbers_are_two_files(pack, tmp_path, monkeypatch, which):
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    for name in ("one", "other"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "one.safetensors")
    os.link(tmp_path / "other.safetensors", tmp_path / "hard.safetensors")
    refuse = pack.nodes.bridge.lora.loras.refuse_one_file
    with pytest.raises(ValueError, match="hold the same LoRA"):
        refuse("other.safetensors", "hard.safetensors")
    without_numbers(monkeypatch, which)
    refuse("one.safetensors", "other.safetensors")
    for same in ("one.safetensors", "link.safetensors"):
        with pytest.raises(ValueError, match="so there is nothing to zip"):
            refuse("one.safetensors", same)


def test_a_disk_that_goes_away_is_named(pack, tmp_path, monkeypatch):
    hashes = pack.nodes.bridge.lora.hashes
    (tmp_path / "one").write_bytes(b"")
    with pytest.raises(hashes.LoRAFileError, match="'other' is missing; choose another file"):
        hashes.is_one_file(str(tmp_path / "one"), str(tmp_path / "other"))

    def stat(path, *given, **more):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(hashes.os, "stat", stat)
    with pytest.raises(hashes.LoRAFileError, match="'one' cannot be read .*Input/output error.*; see that its disk"):
        hashes.is_one_file(str(tmp_path / "one"), str(tmp_path / "one"))
