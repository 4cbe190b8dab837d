"""Files that are read, bound, written and found again: what may change under the pack's hands, and what is written."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace

import pytest
import tiny
import torch
from families import FAMILIES
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_apply import largest_difference, stock, weights, zip_pair
from test_contracts_host import spoiled_after, zip_
from test_formats import as_sources
from test_saved import folders, pair, rename  # noqa: F401  fixtures


def replaced(path, seed: int, patcher) -> None:
    """Another LoRA of the same size in the place of a file, at another time."""
    lora = tiny.full_size.attention_lora(patcher.model, 4, seed, torch.float32)
    save_file({k: t.clone() for k, t in lora.items()}, path)
    os.utime(path, ns=(time.time_ns(), time.time_ns() + 5 * 10**9))


def test_load_lora_pair_keeps_order_and_strengths(pack, folders, pair):  # noqa: F811
    node = next(node for node in pack.nodes.NODES if node.__name__ == "LoadLoRAPair")
    loaded, _ = node.execute("subject.safetensors", "style.safetensors", 0.3, 0.7).args
    ranks = []
    for source, name, strength in (
        (loaded["content"], "subject.safetensors", 0.3),
        (loaded["style"], "style.safetensors", 0.7),
    ):
        assert (source.name, source.strength) == (name, strength)
        own = load_file(folders / "loras" / name)
        assert own.keys() == source.tensors.keys() and all(torch.equal(t, source.tensors[k]) for k, t in own.items())
        ranks.append({t.shape[0] for k, t in own.items() if "lora_down" in k})
    assert ranks == [{4}, {5}]


def test_a_file_that_changes_while_it_is_read_is_refused(pack, folders, pair, monkeypatch):  # noqa: F811
    loras = pack.nodes.bridge.lora.loras
    path, real = folders / "loras" / "subject.safetensors", loras.read_lora_file

    def read(*args, **given):
        tensors = real(*args, **given)
        replaced(path, 77, pair[0])
        return tensors

    monkeypatch.setattr(loras, "read_lora_file", read)
    with pytest.raises(ValueError, match="'subject.safetensors' has changed while it was read"):
        loras.load("subject.safetensors", 1.0)


def test_a_file_that_changes_while_a_pair_is_loaded_is_refused(pack, folders, pair, monkeypatch):  # noqa: F811
    saved, loras = pack.nodes.bridge.saved, pack.nodes.bridge.lora.loras
    name, real = saved.save(pair[1], "mine"), loras.load_sources

    def load_sources(*args, **given):
        replaced(folders / "loras" / "subject.safetensors", 77, pair[0])
        return real(*args, **given)

    monkeypatch.setattr(loras, "load_sources", load_sources)
    with pytest.raises(ValueError, match="'subject.safetensors' has changed"):
        saved.load(pair[0], name)


def test_a_pair_whose_file_has_changed_since_is_not_saved(pack, folders, pair):  # noqa: F811
    replaced(folders / "loras" / "subject.safetensors", 77, pair[0])
    with pytest.raises(ValueError, match="'subject.safetensors' has changed since"):
        pack.nodes.bridge.saved.save(pair[1], "mine")
    assert pack.nodes.bridge.disk.provenance.pair(pair[1].sources) == {}


def test_a_saved_pair_is_as_new_as_its_lora_files(pack, folders, pair):  # noqa: F811
    saved = pack.nodes.bridge.saved
    name = saved.save(pair[1], "mine")
    before = saved.fingerprint(name)
    assert saved.fingerprint(name) == before
    rename(folders, "style.safetensors", "other.safetensors")
    assert saved.fingerprint(name) != before


def test_what_is_rescued_is_what_was_learned(pack, folders, pair):  # noqa: F811
    """A run that fails in its third step leaves what it had after the first: the last whose loss was finite."""
    patcher, sources = pair[0], pair[1].sources
    given = {"sources": sources, "solver": "gradient", "objective": pack.ziplora_core.objective.PAPER}
    learned = zip_(pack, patcher, steps=1, **given)[0].coefficients
    hook = spoiled_after(patcher, 2)
    with pytest.raises(FloatingPointError, match="last finite coefficients are in 'stopped_"):
        zip_(pack, patcher, steps=5, **given)
    hook.remove()
    again = pack.nodes.bridge.saved.load(patcher, "stopped_00001_.safetensors")
    for concept in ("content", "style"):
        kept = again.coefficients[concept]
        assert kept.keys() == learned[concept].keys() and len(kept) > 10
        assert all(torch.equal(m, kept[k]) for k, m in learned[concept].items())
        assert any((m != 1).any() for m in kept.values())


def test_np_lora_changes_the_content_where_the_style_is(pack, pair):  # noqa: F811
    patcher, zipped = pair
    merged = pack.nodes.bridge.direct.merge(patcher, zipped.sources, "NP-LoRA")
    plain = pack.nodes.bridge.direct.merge(patcher, zipped.sources, "sum")
    for name, layer in merged.fitted.loras.layers.items():
        theirs = plain.fitted.loras.layers[name]
        assert torch.equal(layer["style"].down, theirs["style"].down)
        assert (layer["content"].down - theirs["content"].down).norm() > 1e-3 * theirs["content"].down.norm()


@pytest.mark.parametrize(("prefix", "says"), [("ü" * 150, "bytes long"), ("a\nb", "characters that no file name has")])
def test_names_that_no_file_can_have_are_refused(pack, folders, prefix, says):  # noqa: F811
    with pytest.raises(ValueError, match=says):
        pack.nodes.bridge.disk.paths.write_output(prefix, ".json", "{}")
    assert not [p for p in (folders / "output").rglob("*") if p.is_file()]


def test_no_workflow_is_written_where_the_host_writes_none(pack, monkeypatch):
    from types import SimpleNamespace

    from comfy.cli_args import args

    hidden = SimpleNamespace(prompt={"1": {"class_type": "KSampler"}})
    for disabled in (False, True):
        monkeypatch.setattr(args, "disable_metadata", disabled)
        written = pack.nodes.bridge.disk.provenance.workflow(hidden)
        assert written == ({} if disabled else {"prompt": json.dumps(hidden.prompt)})


TE = "lora_te1_text_model_encoder_layers_0_mlp_fc1"


@pytest.fixture
def exported(pack, folders):  # noqa: F811
    """export(zipped, form="kohya", dtype="fp32") -> (tensors, metadata, report) of the file."""

    def export(zipped, form: str = "kohya", dtype: str = "fp32"):
        _, report, name = pack.nodes.bridge.export.export_file(zipped, "mine", 0, dtype, form)
        path = folders / "output" / name
        with safe_open(str(path), framework="pt") as file:
            return load_file(path), file.metadata(), report

    return export


def test_an_exported_file_holds_riders_and_text_encoder_parts_at_their_dials(pack, exported):
    """peft's names for one file, kohya's for the other: both end at the same layer, and add up."""
    patcher, g = tiny.tiny_patcher(), torch.Generator().manual_seed(1)
    files, updates = [], {}
    for seed, names in ((1, "text_encoder.text_model.encoder.layers.0.mlp.fc1"), (2, TE)):
        up, down = torch.randn(6, 2, generator=g), torch.randn(2, 5, generator=g)
        file = tiny.full_size.attention_lora(patcher.model, 2, seed, torch.float32)
        ends = ("lora_B.weight", "lora_A.weight") if "." in names else ("lora_up.weight", "lora_down.weight")
        file |= {f"{names}.{ends[0]}": up, f"{names}.{ends[1]}": down}
        file |= {"lora_unet_out_2.diff_b": torch.full((4,), float(seed)), "lora_unet_out_0.diff": torch.ones(32)}
        files.append(file)
        updates[seed] = up @ down
    sources = as_sources(pack, *files)
    sources = replace(sources, by_concept={**sources.by_concept, "content": replace(sources["content"], strength=0.5)})
    zipped = replace(zip_pair(pack, patcher, sources), dials={"content": 0.5, "style": 2.0})
    tensors, metadata, _ = exported(zipped)
    up, down = tensors[f"{TE}.lora_up.weight"], tensors[f"{TE}.lora_down.weight"]
    scale = float(tensors[f"{TE}.alpha"]) / down.shape[0]
    torch.testing.assert_close(scale * up @ down, 0.25 * updates[1] + 2.0 * updates[2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tensors["lora_unet_out_2.diff_b"], torch.full((4,), 0.25 * 1 + 2.0 * 2))
    torch.testing.assert_close(tensors["lora_unet_out_0.diff"], torch.full((32,), 2.25))
    ours = weights(pack.nodes.bridge.apply.apply(patcher, None, zipped, 1.0)[0])
    assert largest_difference(weights(stock(patcher, tensors)), ours) < 1e-4
    ranks = {t.shape[0] for k, t in tensors.items() if k.endswith("lora_down.weight")}
    assert metadata["ss_network_alpha"] == metadata["ss_network_dim"] == str(max(ranks))
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"


@pytest.mark.parametrize(("value", "strength"), [(1e6, 1.0), (-3e4, 4.0)])
def test_differences_that_a_dtype_cannot_hold_are_refused_by_name(pack, exported, value, strength):
    """Of a bias: as of the matrices, by the file itself or at its strength."""
    patcher = tiny.tiny_patcher()
    files = [tiny.full_size.attention_lora(patcher.model, 2, seed, torch.float32) for seed in (1, 2)]
    files[1]["lora_unet_out_2.diff_b"] = torch.tensor([0.0, value, 0.0, 0.0])
    sources = as_sources(pack, *files)
    sources = replace(sources, by_concept=tiny.of_two(sources["content"], replace(sources["style"], strength=strength)))
    zipped = zip_pair(pack, patcher, sources)
    with pytest.raises(
        ValueError, match="layer 'lora_unet_out_2.diff_b' holds numbers too large for torch.float16; exp"
    ):
        exported(zipped, dtype="fp16")
    tensors, *_ = exported(zipped, dtype="fp32")
    assert tensors["lora_unet_out_2.diff_b"][1] == value * strength


def test_what_an_exported_file_has_no_place_for_is_said(pack, exported):
    patcher = tiny.tiny_patcher()
    file = tiny.full_size.attention_lora(patcher.model, 2, 1, torch.float32)
    file |= {f"{TE}.hada_w{i}_a": torch.ones(6, 2) for i in (1, 2)}
    file |= {f"{TE}.hada_w{i}_b": torch.ones(2, 5) for i in (1, 2)}
    file["lora_unet_out_0.set_weight"] = torch.ones(32)
    zipped = zip_pair(pack, patcher, as_sources(pack, file, tiny.full_size.attention_lora(patcher.model, 2, 2)))
    tensors, _, report = exported(zipped)
    assert not [k for k in tensors if k.startswith(("lora_te", "lora_unet_out_0"))]
    assert TE in report and "no plain LoRA" in report
    assert "diffusion_model.out.0.weight" in report and "left out" in report


def test_sd_15_is_written_in_the_names_that_its_trainers_use(pack, exported):
    family = FAMILIES["SD 1.5"]
    patcher = family.patcher()
    zipped = zip_pair(
        pack, patcher, as_sources(pack, family.lora(patcher.model, 2, 1), family.lora(patcher.model, 2, 2))
    )
    tensors, metadata, _ = exported(zipped)
    layers = {k.split(".")[0] for k in tensors}
    assert layers and all(
        k.startswith(("lora_unet_down_blocks_", "lora_unet_mid_block_", "lora_unet_up_blocks_")) for k in layers
    )
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q" in layers
    assert metadata["ss_base_model_version"] == "sd_v1"


def test_so_many_percent_are_so_many_elements(pack, folders, pair):  # noqa: F811
    patcher, zipped = pair
    tensors, _ = pack.nodes.bridge.sparse.sparsify(patcher, "subject.safetensors", 10.0)
    whole = {f"lora_unet_{n[16:-7].replace('.', '_')}.diff": f for n, layer in zipped.fitted.loras.layers.items()
             for c, f in layer.items() if c == "content"}  # fmt: skip
    assert set(tensors) == set(whole)
    for name, factors in whole.items():
        delta = factors.up @ factors.down
        kept = tensors[name].float() != 0
        assert kept.float().mean().item() == pytest.approx(0.1, abs=0.01)
        assert delta.abs()[kept].min() >= delta.abs()[~kept].max() * (1 - 1e-3), "the largest are kept"
