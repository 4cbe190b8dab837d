"""Files that libraries write: our update is what the library itself makes of the weights, or the stock loader's."""

from __future__ import annotations

import libraries
import pytest
import twins
from libraries import by_diffusers, by_lycoris, by_peft

R = {"r": 4, "lora_alpha": 2}
PATTERNS = {"rank_pattern": {"attn2.to_k": 2, "attn1.to_v": 6}, "alpha_pattern": {"attn2.to_k": 8, "attn1.to_v": 3}}
CONVOLUTIONS = {"target_modules": [*libraries.ATTENTION, "conv1", "ff.net.2", "proj_in"]}

# file -> (who writes it, settings, whose update it must be)
FILES = {
    "diffusers, alpha in the header": (by_diffusers, R),
    "diffusers, alpha above the rank": (by_diffusers, {"r": 4, "lora_alpha": 8}),
    "diffusers, patterns in the header": (by_diffusers, {**R, **PATTERNS}),
    "diffusers, rsLoRA": (by_diffusers, {"r": 4, "lora_alpha": 2, "use_rslora": True}),
    "diffusers, of one model": (by_diffusers, {**R, **PATTERNS, "how": "model"}),
    "diffusers, convolutions": (by_diffusers, {**R, **CONVOLUTIONS}),
    "diffusers, DoRA": (by_diffusers, {**R, "use_dora": True}),
    "diffusers, DoRA of convolutions": (by_diffusers, {**R, **CONVOLUTIONS, "use_dora": True}),
    "peft": (by_peft, R),
    "peft, patterns": (by_peft, {**R, **PATTERNS}),
    "peft, rsLoRA": (by_peft, {**R, "use_rslora": True}),
    "peft, DoRA": (by_peft, {**R, "use_dora": True}),
    "peft, LoHa": (by_peft, {"kind": "LoHaConfig", "r": 4, "alpha": 2}),
    "peft, LoHa of convolutions": (
        by_peft, {"kind": "LoHaConfig", "r": 4, "alpha": 2, "use_effective_conv2d": True, **CONVOLUTIONS}
    ),
    "peft, LoKr": (by_peft, {"kind": "LoKrConfig", "r": 4, "alpha": 2}),
    "peft, LoKr of whole factors": (by_peft, {"kind": "LoKrConfig", "r": 64, "alpha": 2}),
    "peft, LoKr of convolutions": (
        by_peft, {"kind": "LoKrConfig", "r": 2, "alpha": 3, "use_effective_conv2d": True, "decompose_both": True,
                  **CONVOLUTIONS}
    ),
    "lycoris, LoCon": (by_lycoris, {"algo": "locon"}),
    "lycoris, LoCon with Tucker core": (by_lycoris, {"algo": "locon", "use_tucker": True}),
    "lycoris, LoHa": (by_lycoris, {"algo": "loha"}),
    "lycoris, LoHa with Tucker core": (by_lycoris, {"algo": "loha", "use_tucker": True}),
    "lycoris, LoKr": (by_lycoris, {"algo": "lokr"}),
    "lycoris, LoKr with Tucker core": (
        by_lycoris, {"algo": "lokr", "use_tucker": True, "linear_dim": 2, "conv_dim": 2, "conv_alpha": 3.0}
    ),
    "lycoris, full": (by_lycoris, {"algo": "full"}),
    "lycoris, GLoRA": (by_lycoris, {"algo": "glora"}),
    "lycoris, OFT": (by_lycoris, {"algo": "diag-oft"}),
    "lycoris, BOFT": (by_lycoris, {"algo": "boft"}),
    "lycoris, DoRA on the input axis": (by_lycoris, {"algo": "locon", "dora_wd": True, "wd_on_output": False}),
    "SimpleTuner, LoKr": (by_lycoris, {"algo": "lokr", "names": "SimpleTuner"}),
    "OneTrainer, DoRA on the output axis": (by_lycoris, {"algo": "locon", "dora_wd": True, "names": "OneTrainer"}),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The loras folder, with a folder in it for one LoRA."""
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    folder_paths.filename_list_cache.clear()
    (tmp_path / "one").mkdir()
    return tmp_path / "one"


def updates(pack, patcher, strength=1.0):
    """(Weight -> our update in float64, the file's notes), as the nodes read it."""
    bridge = pack.nodes.bridge
    source = bridge.lora.loras.load("one/subject.safetensors", strength)
    fitting = bridge.lora.fitting.fit_one(source, patcher.model)
    deltas = {
        key: (f.scale * (f.up.double() @ f.down.double().flatten(1))).reshape(patcher.model.state_dict()[key].shape)
        for key, f in fitting.factors.items()
    }
    return deltas, [*source.notes, *fitting.unused, *fitting.notes()]


def off(found, wanted) -> float:
    """The largest relative difference of a layer's update, in norm."""
    assert found.keys() == wanted.keys()
    return max(((found[k] - wanted[k]).norm() / wanted[k].norm()).item() for k in wanted)


@pytest.mark.parametrize("name", FILES)
def test_the_update_is_the_librarys(pack, folder, name):
    write, settings = FILES[name]
    model = twins.sdxl()
    wanted = model.placed(write(model, folder, **settings))
    assert len(wanted) > 10
    found, notes = updates(pack, model.patcher)
    assert off(found, wanted) < 1e-6


TRANSFORMERS = {
    "Flux": (
        twins.flux,
        ["to_q", "add_k_proj", "to_add_out", "ff.net.2", "proj_mlp", "norm_out.linear", "x_embedder"],
    ),
    "SD 3": (twins.sd3, ["to_q", "add_v_proj", "to_out.0", "ff_context.net.0.proj", "norm_out.linear", "proj_out"]),
    "Qwen-Image": (twins.qwen, ["to_k", "add_q_proj", "img_mlp.net.2", "img_in"]),
    "Z-Image": (twins.z_image, ["to_q", "to_v", "to_out.0", "w2"]),
    "Lumina 2": (twins.lumina, ["to_q", "to_k", "to_v", "to_out.0", "linear_2", "norm1.linear", "linear_1"]),
}
WAYS = {
    "pipeline": (by_diffusers, {}),
    "model": (by_diffusers, {"how": "model"}),
    "DoRA": (by_diffusers, {"use_dora": True}),
    "peft": (by_peft, {}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", TRANSFORMERS)
def test_transformers_in_diffusers_names(pack, folder, family, way):
    make, layers = TRANSFORMERS[family]
    model = make()
    write, settings = WAYS[way]
    wanted = model.placed(write(model, folder, **R, **settings, target_modules=layers))
    assert len(wanted) >= len(layers)
    found, _ = updates(pack, model.patcher)
    assert off(found, wanted) < 1e-6
