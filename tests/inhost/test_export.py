"""An exported merge in other hands: the host's own loader, diffusers and peft."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_apply import largest_difference, random_coefficients, stock, weights, zip_pair
from test_formats import as_sources, diffusers_names
from test_text_encoder import with_text_encoder


@pytest.fixture
def output(tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return tmp_path


@pytest.fixture
def zipped(pack):
    """Attention, linear layers beside it, convolutions, a bias and a norm; ranks 4 and 8; dials turned."""
    patcher = tiny.tiny_patcher()
    sources = tiny.sources(pack, patcher.model, strengths=(0.7, 1.1))
    g = torch.Generator().manual_seed(3)
    for source, rank in ((sources["content"], 3), (sources["style"], 5)):
        for key, weight in patcher.model.state_dict().items():
            if key.endswith(("in_layers.2.weight", "skip_connection.weight", "ff.net.2.weight")):
                name = "lora_unet_" + key.removeprefix("diffusion_model.").removesuffix(".weight").replace(".", "_")
                out, *rest = weight.shape
                source.tensors[f"{name}.lora_up.weight"] = torch.randn(out, rank, *[1] * (weight.ndim - 2), generator=g)
                source.tensors[f"{name}.lora_down.weight"] = torch.randn(rank, *rest, generator=g)
        source.tensors["lora_unet_out_2.diff_b"] = torch.randn(4, generator=g)
        source.tensors["lora_unet_out_0.diff"] = torch.randn(32, generator=g)
    zipped = zip_pair(pack, patcher, sources)
    assert zipped.fitted.notes == []
    dialled = random_coefficients(pack, zipped.fitted.loras).scaled(content=0.9, style=1.2)
    return patcher, replace(zipped, coefficients=dialled, dials={"content": 0.9, "style": 1.2})


def written(folder, report):
    path = folder / report.splitlines()[0].split("written: ")[1].strip()
    assert path.is_file() and not [p for p in path.parent.iterdir() if p.suffix == ".part"]
    return path


@pytest.mark.smoke
def test_exact_export_in_the_stock_loader_is_the_zipped_pair(pack, zipped, output):
    patcher, pair = zipped
    tensors, report, _ = pack.nodes.bridge.export.export_file(pair, "loras/mine", 0, "fp32", "kohya")
    file = load_file(written(output, report))
    assert file.keys() == tensors.keys() and all(torch.equal(file[k], tensors[k]) for k in file)
    ours, _ = pack.nodes.bridge.apply.apply(patcher, None, pair, 0.8)
    theirs = stock(patcher, file, 0.8)
    assert largest_difference(weights(theirs), weights(patcher)) > 0.1
    assert largest_difference(weights(ours), weights(theirs)) < 1e-5
    torch.testing.assert_close(tiny.sample(ours), tiny.sample(theirs), rtol=1e-3, atol=1e-3)
    assert "exact: nothing is cut" in report


@pytest.mark.parametrize("method", ["TIES", "DARE", "KnOTS", "TSV-Merge", "SVD"])
def test_a_papers_merge_in_the_stock_loader_is_what_is_applied(pack, zipped, method):
    """With a dial turned, which each LoRA's own part obeys, and no larger than its form needs."""
    patcher, pair = zipped
    merged = pack.nodes.bridge.direct.merge(patcher, pair.sources, method).dialled({"style": 0.5})
    exported = pack.nodes.bridge.export.export_tensors(merged, 0, "fp32", "kohya")
    bare = weights(patcher)
    ours = weights(pack.nodes.bridge.apply.apply(patcher, None, merged, 0.8)[0])
    theirs = weights(stock(patcher, exported.tensors, 0.8))
    assert largest_difference(ours, theirs) < 1e-5 and largest_difference(ours, bare) > 0.01
    loras = pack.nodes.bridge.lora.fitting.fit(pair.sources, patcher.model).loras
    for key, layer in loras.layers.items():
        ranks = [f.rank for f in layer.values()]
        low = {"KnOTS": sum(ranks), "TSV-Merge": sum(-(-r // 2) for r in ranks), "SVD": max(ranks)}
        most = low.get(method, next(iter(layer.values())).shape[0])
        name = "lora_unet_" + key.removeprefix("diffusion_model.").removesuffix(".weight").replace(".", "_")
        assert exported.tensors[f"{name}.lora_down.weight"].shape[0] <= most, key


def test_a_merge_that_memory_cannot_hold_is_refused_before_it_is_made(pack, zipped, monkeypatch):
    patcher, pair = zipped
    bridge = pack.nodes.bridge.direct
    need = pack.ziplora_core.direct.whole.size(pack.nodes.bridge.lora.fitting.fit(pair.sources, patcher.model).loras)
    for free, fits in ((need, True), (need - 1, False)):
        monkeypatch.setattr(bridge.management, "get_free_memory", lambda device, free=free: free)
        if fits:
            assert f"updates are kept whole, {need / 1e6:,.0f} MB" in bridge.merge(patcher, pair.sources, "TIES").report
            continue
        for method in ("TIES", "DARE"):
            others = "sum or shared columns or KnOTS or TSV-Merge or SVD"
            says = f"{method} would hold .* GB of memory are free; choose {others}, or close"
            with pytest.raises(MemoryError, match=says):
                bridge.merge(patcher, pair.sources, method)
        assert "the cut keeps" in bridge.merge(patcher, pair.sources, "SVD").report


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp16", 2e-3), ("bf16", 2e-2)])
def test_half_precision_is_as_near_as_it_can_be(pack, zipped, output, dtype, tolerance):
    patcher, pair = zipped
    tensors, *_ = pack.nodes.bridge.export.export_file(pair, "mine", 0, dtype, "kohya")
    kinds = {t.dtype for k, t in tensors.items() if not k.endswith(".alpha")}
    assert kinds == {pack.ziplora_core.export.DTYPES[dtype]}
    ours, _ = pack.nodes.bridge.apply.apply(patcher, None, pair, 1.0)
    bare, mine, theirs = weights(patcher), weights(ours), weights(stock(patcher, tensors))
    for key, weight in mine.items():
        change = (weight - bare[key]).norm()
        assert (theirs[key] - weight).norm() <= tolerance * change + 1e-6, key


def test_smaller_rank_says_what_is_kept(pack, zipped, output):
    patcher, pair = zipped
    tensors, report, _ = pack.nodes.bridge.export.export_file(pair, "mine", 6, "fp32", "kohya")
    assert max(t.shape[0] for k, t in tensors.items() if "lora_down" in k) == 6
    assert "cut to rank 6" in report and "of the energy is kept on the mean" in report
    ours, _ = pack.nodes.bridge.apply.apply(patcher, None, pair, 1.0)
    bare, mine, theirs = weights(patcher), weights(ours), weights(stock(patcher, tensors))
    for name, up, down in tiny.merged_layers(pack, pair):
        values = torch.linalg.svdvals(up.double() @ down.double().flatten(1))
        name = name.removeprefix("diffusion_model.")
        error = (theirs[name] - mine[name]).double().norm()
        assert error.item() == pytest.approx(values[6:].square().sum().sqrt().item(), rel=1e-3, abs=1e-4)
        assert (mine[name] - bare[name]).norm() > 0


def test_metadata_says_what_it_is(pack, zipped, output):
    _, pair = zipped
    _, report, _ = pack.nodes.bridge.export.export_file(pair, "mine", 0, "fp16", "kohya")
    with safe_open(str(written(output, report)), framework="pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_module"] == "networks.lora" and metadata["ss_network_dim"] == "12"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert "content" in metadata["modelspec.description"] and "exact" in metadata["modelspec.description"]


def test_prefix_stays_in_the_output_folder_and_counts_up(pack, zipped, output):
    _, pair = zipped
    files = [pack.nodes.bridge.export.export_file(pair, "a/b", 0, "fp16", "kohya")[1].split("  \n")[0] for _ in "12"]
    assert files == ["written: a/b_00001_.safetensors", "written: a/b_00002_.safetensors"]
    for prefix in ("../out", "/tmp/out", "a/../../out", ""):
        with pytest.raises(ValueError, match="filename_prefix"):
            pack.nodes.bridge.export.export_file(pair, prefix, 0, "fp16", "kohya")
    assert sorted(p.name for p in output.rglob("*.safetensors")) == ["b_00001_.safetensors", "b_00002_.safetensors"]


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_text_encoder_parts_go_along(pack, miniature, output, form):
    import comfy.sd

    patcher, clip = tiny.tiny_patcher(), miniature.clip
    loras, core = pack.nodes.bridge.lora.zipped, pack.ziplora_core
    sources = as_sources(pack, *(with_text_encoder(patcher, clip, seed) for seed in (1, 2)))
    fitted = pack.nodes.bridge.lora.fitting.fit(sources, patcher.model)
    zipped = loras.ZippedLoRA(sources, fitted, core.coefficients.Coefficients.ones(fitted.loras), tiny.of_two(0.5, 1.5))
    _, report, _ = pack.nodes.bridge.export.export_file(zipped, "mine", 0, "fp32", form)
    file = load_file(written(output, report))
    _, theirs = comfy.sd.load_lora_for_models(patcher, clip, file, 0, 1.0)
    _, ours = pack.nodes.bridge.apply.apply(patcher, clip, zipped, 1.0)

    def encoded(text_encoder) -> torch.Tensor:
        with torch.inference_mode():
            return text_encoder.encode_from_tokens(text_encoder.tokenize("a red star in neon style")).clone()

    assert not torch.allclose(encoded(theirs), encoded(clip), atol=1e-2)
    torch.testing.assert_close(encoded(ours), encoded(theirs), rtol=1e-3, atol=1e-3)


def test_diffusers_and_peft_read_the_same_update(pack, output):
    """A UNet of diffusers' own class with as many blocks: what its loader adds to each weight is ours."""
    diffusers = pytest.importorskip("diffusers")
    patcher = tiny.tiny_patcher()
    pair = zip_pair(pack, patcher, tiny.sources(pack, patcher.model, strengths=(0.7, 1.1)))
    pair = replace(pair, coefficients=random_coefficients(pack, pair.fitted.loras))
    _, report, _ = pack.nodes.bridge.export.export_file(pair, "mine", 0, "fp32", "diffusers")
    file = load_file(written(output, report))
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64, 64),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=1,
        attention_head_dim=(2, 4, 4),
        cross_attention_dim=96,
        use_linear_projection=True,
    )
    mine = {k.removeprefix("unet."): v for k, v in file.items()}
    unet.load_lora_adapter(mine, prefix=None, adapter_name="zipped")
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    unet.fuse_lora()
    after = unet.state_dict()
    names, seen = diffusers_names(patcher.model), 0
    for key, up, down in tiny.merged_layers(pack, pair):
        name = names[key].removesuffix(".weight") + ".base_layer.weight"
        torch.testing.assert_close(after[name] - before[name], up @ down, rtol=1e-4, atol=1e-4)
        seen += 1
    assert seen == len(pair.fitted.loras.layers) == len(file) // 2


def test_a_model_that_diffusers_has_no_names_for_is_refused(pack, zipped, output):
    _, pair = zipped
    nameless = replace(pair, fitted=replace(pair.fitted, names=replace(pair.fitted.names, diffusers={})))
    with pytest.raises(ValueError, match="diffusers has no name.*kohya's format"):
        pack.nodes.bridge.export.export_file(nameless, "mine", 0, "fp16", "diffusers")
    assert not list(output.rglob("*"))


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (None, "ZipLoRA of 'content' (subject) and 'style' (style)"),
        ("sum", "Direct merge (sum) of 'content' (subject)"),
        ("NP-LoRA", "NP-LoRA merge (mu 0.5) of 'content' (subject)"),
        ("TIES", "TIES merge (share 0.2, scale 1) of 'content' (subject)"),
        ("DARE", "DARE merge (drop 0.5, seed 0) of 'content' (subject)"),
        ("KnOTS", "KnOTS merge (share 0.2, scale 1) of 'content' (subject)"),
        ("TSV-Merge", "TSV-Merge of 'content' (subject)"),
        ("SVD", "Direct merge (sum cut by SVD) of 'content' (subject)"),
        ("UnZipLoRA blocks", "Merge by UnZipLoRA blocks of 'content' (subject)"),
    ],
)
def test_a_merge_is_named_by_its_method(pack, zipped, method, says):
    patcher, pair = zipped
    if method is not None:
        pair = pack.nodes.bridge.direct.merge(patcher, pair.sources, method)
    exported = pack.nodes.bridge.export.export_tensors(pair, 0, "fp32", "kohya")
    assert exported.metadata["modelspec.description"].startswith(says)
