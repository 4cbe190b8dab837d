"""What is said of files that libraries write, and files that only the host knows, or nobody."""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import replace
from pathlib import Path

import families
import pytest
import torch
import twins
from libraries import by_diffusers, by_lycoris, by_peft, edit_config
from safetensors.torch import load_file, save_file
from test_apply import stock, weights
from test_library_files import R, folder, off, updates

__all__ = ["folder"]  # a fixture


def changed(bare, patched):
    """Weight -> what the host has added to it, in float64."""
    differ = [key for key in bare if not torch.equal(patched[key], bare[key])]
    return {f"diffusion_model.{key}": patched[key].double() - bare[key].double() for key in differ}


@pytest.mark.parametrize("strength", [1.0, 0.7])
@pytest.mark.parametrize("algo", ["locon", "loha"])
def test_a_dora_scale_for_rows_in_kohyas_names_is_the_hosts(pack, folder, algo, strength):
    """The host's loader reads it, and not as LyCORIS trains it: who chose a strength there finds it here."""
    model = twins.sdxl()
    trained = model.placed(by_lycoris(model, folder, algo=algo, dora_wd=True, preset="attn-only"))
    found, notes = updates(pack, model.patcher, strength)
    patched = weights(stock(model.patcher, load_file(folder / "subject.safetensors"), strength))
    bare = weights(model.patcher)
    hosts = changed(bare, patched)
    assert off(found, hosts) < 1e-5
    assert off({k: trained[k] for k in hosts}, hosts) > 0.1, "the host computes what LyCORIS does: nothing to say"
    assert any("have a DoRA scale for each row: as ComfyUI's own loader computes it" in note for note in notes)


@pytest.mark.parametrize(
    ("write", "settings"),
    [
        (by_diffusers, R),
        (by_peft, {**R, "use_dora": True}),
        (by_lycoris, {"algo": "locon", "dora_wd": True, "names": "OneTrainer"}),
    ],
    ids=["diffusers", "peft, DoRA", "OneTrainer, DoRA"],
)
def test_what_the_hosts_loader_does_not_read_is_stacked_as_its_library_computes(pack, folder, write, settings):
    """A bypassed zip is compared with all of the LoRA, at any strength."""
    model, bridge = twins.sdxl(), pack.nodes.bridge
    wanted = model.placed(write(model, folder, **settings))
    sources = bridge.lora.loras.LoRASources({"content": bridge.lora.loras.load("one/subject.safetensors", -0.5)})
    with torch.inference_mode():
        stacked, _ = bridge.apply.stack(model.patcher, None, sources, 0.8)
    found = changed(weights(model.patcher), weights(stacked))
    assert off(found, {key: -0.4 * delta for key, delta in wanted.items()}) < 1e-4


def test_of_peft_without_its_configuration_the_note_says_so(pack, folder):
    model = twins.sdxl()
    wanted = model.placed(by_peft(model, folder, beside=False, **R))
    found, (note,) = updates(pack, model.patcher)
    assert note.startswith("'one/subject.safetensors' gives no alpha: peft writes it into 'adapter_config.json'")
    assert off({k: d / 2 for k, d in found.items()}, wanted) < 1e-6


@pytest.mark.parametrize(
    "spoil", ["another LoRA's", "no JSON", "no alpha", "too large", "catastrophic", "in a shared folder"]
)
def test_a_configuration_that_is_not_the_files_is_not_used(pack, folder, spoil):
    model = twins.sdxl()
    wanted = model.placed(by_peft(model, folder, **R))
    if spoil == "another LoRA's":
        edit_config(folder, r=16)
    elif spoil == "no JSON":
        (folder / "adapter_config.json").write_text("{")
    elif spoil == "no alpha":
        edit_config(folder, lora_alpha=None)
    elif spoil == "too large":
        edit_config(folder, more=" " * 2**20)
    elif spoil == "catastrophic":
        edit_config(folder, alpha_pattern={"(a+)+$": 3})
    else:
        (folder / "style.safetensors").write_bytes((folder / "subject.safetensors").read_bytes())
    found, notes = updates(pack, model.patcher)
    assert off({k: d / 2 for k, d in found.items()}, wanted) < 1e-6
    why = {
        "another LoRA's": "names other ranks than it has",
        "no JSON": "holds no table in JSON",
        "no alpha": "gives no r and lora_alpha",
        "too large": "is too large",
        "catastrophic": "has patterns that are not read",
        "in a shared folder": "may be another LoRA's, as they share a folder",
    }[spoil]
    (note,) = notes
    assert "gives no alpha: 'adapter_config.json'" in note and why in note and "not beside it" not in note


def test_a_changed_configuration_is_another_file(pack, folder):
    """Or the host would keep what it zipped with the old one."""
    by_peft(twins.sdxl(), folder, **R)
    fingerprint = pack.nodes.bridge.lora.loras.fingerprint
    before = fingerprint("one/subject.safetensors")
    assert fingerprint("one/subject.safetensors") == before
    edit_config(folder, lora_alpha=3)
    changed = fingerprint("one/subject.safetensors")
    assert changed != before
    place = folder / "adapter_config.json"
    status = place.stat()
    place.write_text(place.read_text().replace('"lora_alpha": 3', '"lora_alpha": 5'))
    os.utime(place, ns=(status.st_atime_ns, status.st_mtime_ns - 10**12))
    older = fingerprint("one/subject.safetensors")
    assert older not in (before, changed), "an older one was put there"
    place.unlink()
    without = fingerprint("one/subject.safetensors")
    assert without not in (before, changed, older)


def test_a_configuration_that_is_older_than_its_file_counts_too(pack, folder):
    """Gone, or no longer its own as another LoRA came: what is read then is another update."""
    by_peft(twins.sdxl(), folder, **R)
    place, file = folder / "adapter_config.json", folder / "subject.safetensors"
    time.sleep(0.02)
    file.write_bytes(file.read_bytes())
    assert file.stat().st_ctime_ns > place.stat().st_ctime_ns
    fingerprint = pack.nodes.bridge.lora.loras.fingerprint
    before = fingerprint("one/subject.safetensors")
    assert pack.nodes.bridge.lora.loras.load("one/subject.safetensors", 1.0).version == before
    (folder / "style.safetensors").write_bytes(b"")
    assert fingerprint("one/subject.safetensors") != before
    (folder / "style.safetensors").unlink()
    assert fingerprint("one/subject.safetensors") == before
    place.unlink()
    assert fingerprint("one/subject.safetensors") != before


def test_a_folder_without_a_configuration_is_not_listed(pack, folder, monkeypatch):
    """Shared folders hold thousands of files, and each is asked for its fingerprint."""
    by_peft(twins.sdxl(), folder, beside=False, **R)
    monkeypatch.setattr(os, "scandir", None)
    assert pack.nodes.bridge.lora.adapter_config.place(str(folder / "subject.safetensors")) is None


def test_scales_from_elsewhere_are_told_by_a_digest(pack, folder):
    """Which a zip's identity needs: the file's bytes are the same whatever its configuration says."""
    by_peft(twins.sdxl(), folder, **R)

    def digest() -> str:
        return pack.nodes.bridge.lora.loras.load("one/subject.safetensors", 1.0).config

    first = digest()
    edit_config(folder, inference_mode=False)
    assert first and digest() == first, "what is no scale counts"
    edit_config(folder, alpha_pattern={"attn2.to_k": 3})
    assert digest() not in (first, "")
    edit_config(folder, lora_alpha=4, alpha_pattern={})
    assert digest() == "", "scales of 1 are none"


@pytest.mark.parametrize(("kind", "says"), [("BOFTConfig", "BOFT of peft"), ("FourierFTConfig", "FourierFT")])
def test_what_is_not_read_is_named(pack, folder, kind, says):
    """By its kind and a tensor that shows it, never as made for another model."""
    settings = {"boft_block_size": 4} if kind == "BOFTConfig" else {"n_frequency": 8}
    by_peft(twins.sdxl(), folder, kind=kind, **settings, target_modules=["attn1.to_q"])
    with pytest.raises(
        pack.ziplora_core.files.LoRAFileError, match=rf"subject.safetensors' holds {says}.* \(tensor '.*to_q\."
    ):
        pack.nodes.bridge.lora.fitting.fit_one(
            pack.nodes.bridge.lora.loras.load("one/subject.safetensors", 1.0), twins.sdxl().patcher.model
        )


def test_names_of_the_models_own_family_are_not_another_models(pack, folder):
    model = twins.flux()
    save_file(
        {f"net.single_blocks.0.no_such.lora_{ab}.weight": torch.ones(2, 2) for ab in "AB"},
        folder / "subject.safetensors",
    )
    with pytest.raises(pack.ziplora_core.files.LoRAFileError) as caught:
        updates(pack, model.patcher)
    said = str(caught.value)
    assert "looks like a LoRA for Flux, as this model is" in said and "no layer that fits" not in said
    assert "'net.single_blocks.0.no_such.lora_A.weight'" in said


def test_levels_with_unequal_blocks_have_their_own_names(pack, folder):
    """What the host's table takes for one layer is another, or none."""
    unequal = {"num_res_blocks": [1, 2], "transformer_depth": [1, 1, 1], "transformer_depth_output": [1, 1, 1, 1, 1]}
    family = families.FAMILIES["SD 1.5"]
    model = replace(family, unet={**family.unet, **unequal}).patcher().model
    table = pack.nodes.bridge.lora.diffusers_names.of_unet(model.model_config.unet_config)
    state = model.diffusion_model.state_dict()
    attention = {name: key for name, key in table.items() if ".attn" in name and name.endswith(".weight")}
    assert {key for key in state if ".attn" in key and key.endswith(".weight")} == set(attention.values())
    file = {}
    for number, (name, key) in enumerate(attention.items()):
        file[f"unet.{name.removesuffix('weight')}lora_B.weight"] = torch.full(
            (state[key].shape[0], 1), float(number + 1)
        )
        file[f"unet.{name.removesuffix('weight')}lora_A.weight"] = torch.ones(1, state[key].shape[1])
    save_file(file, folder / "subject.safetensors")
    fitting = pack.nodes.bridge.lora.fitting.fit_one(
        pack.nodes.bridge.lora.loras.load("one/subject.safetensors", 1.0), model
    )
    assert {k.removeprefix("diffusion_model."): f.up[0, 0].item() for k, f in fitting.factors.items()} == {
        key: number + 1 for number, key in enumerate(attention.values())
    }


def test_what_the_stock_loader_converts_is_converted(pack, folder):
    """USO's names of Flux: its loader's node calls `convert_lora` first, so do we."""
    family = replace(
        families.FAMILIES["Flux"], unet={**families.FAMILIES["Flux"].unet, "depth": 19, "depth_single_blocks": 38}
    )
    patcher = family.patcher()
    g = torch.Generator().manual_seed(0)
    file, rows = {}, {"qkv": 192, "proj": 64}
    for block, parts in (("double_blocks.18", ("1", "2")), ("single_blocks.37", ("",))):
        for kind, part in itertools.product(rows, parts):
            name = f"{block}.processor.{kind}_lora{part}"
            columns = 320 if kind == "proj" and not part else 64
            file[f"{name}.up.weight"] = torch.randn(rows[kind], 2, generator=g)
            file[f"{name}.down.weight"] = torch.randn(2, columns, generator=g)
    save_file(file, folder / "subject.safetensors")
    found, _ = updates(pack, patcher)
    patched, bare = weights(stock(patcher, file)), weights(patcher)
    hosts = changed(bare, patched)
    assert len(hosts) == 6
    assert off(found, hosts) < 1e-5
    bridge = pack.nodes.bridge
    sources = bridge.lora.loras.LoRASources({"content": bridge.lora.loras.load("one/subject.safetensors", 1.0)})
    with torch.inference_mode():
        stacked, _ = bridge.apply.stack(patcher, None, sources, 1.0)
    assert off(changed(bare, weights(stacked)), hosts) < 1e-5


def test_oft_of_kohyas_scripts(pack, folder):
    """The host does not know its prefix. Read from a file that the scripts wrote, at half strength."""
    model = twins.sdxl()
    written = load_file(Path(__file__).with_name("trainers") / "kohya_oft.safetensors")
    wanted = {}
    for name in [name for name in written if name.startswith("base.")]:
        base, layer = written.pop(name), name.removeprefix("base.")
        key = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_" + layer[-1] + ".weight"
        with torch.inference_mode():
            model.patcher.model.state_dict()[key].copy_(base)
        wanted[key] = written.pop(f"merged at 0.5.{layer}").double() - base.double()
    save_file(written, folder / "subject.safetensors")
    found, _ = updates(pack, model.patcher, 0.5)
    assert off(found, wanted) < 1e-6
