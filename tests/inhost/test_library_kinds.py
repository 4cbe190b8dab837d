"""Kinds of update of peft's and OneTrainer's that the host has no adapter for: biases, slices, what a file lacks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import twins
from libraries import by_peft, edit_config
from safetensors.torch import load_file, save_file
from test_apply import weights
from test_library_files import folder, off, updates
from test_library_notes import changed

__all__ = ["folder"]  # a fixture
OFT = {"kind": "OFTConfig", "r": 0, "oft_block_size": 8}
IA3 = {"kind": "IA3Config", "feedforward_modules": []}
KINDS = {
    "OFT": OFT,
    "IA³": IA3,
    "VeRA": {"kind": "VeraConfig", "r": 6},
    "AdaLoRA": {"kind": "AdaLoraConfig", "init_r": 4, "lora_alpha": 3, "total_step": 10},
}


def rewritten(folder, edit: Callable[[dict], dict]) -> None:
    path = folder / "subject.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in edit(load_file(path)).items()}, path)


def of_onetrainer(tensors):
    """Its names: kohya's prefix, no dots."""
    return {
        "lora_unet_" + key.removeprefix("base_model.model.").removesuffix(".oft_R.weight").replace(".", "_")
        + ".oft_R.weight": tensor
        for key, tensor in tensors.items()
    }  # fmt: skip


def test_oft_of_onetrainer(pack, folder):
    """The same form under names that the host's loader knows."""
    model = twins.sdxl()
    wanted = model.placed(by_peft(model, folder, beside=False, **OFT))
    rewritten(folder, of_onetrainer)
    found, notes = updates(pack, model.patcher)
    assert off(found, wanted) < 1e-6
    assert not any("does not say" in note for note in notes)


@pytest.mark.parametrize("kind", KINDS)
def test_slices_of_fused_weights(pack, folder, kind):
    """Flux keeps q, k and v in one weight, and one layer in another order of rows."""
    model = twins.flux()
    layers = ["to_q", "to_v", "proj_mlp", "norm_out.linear", "add_k_proj"]
    wanted = model.placed(by_peft(model, folder, **KINDS[kind], target_modules=layers))
    found, _ = updates(pack, model.patcher)
    assert off(found, wanted) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_stacked_as_their_library_computes(pack, folder, kind):
    model, bridge = twins.sdxl(), pack.nodes.bridge
    wanted = model.placed(by_peft(model, folder, **KINDS[kind], target_modules=["attn1.to_q", "attn2.to_k"]))
    sources = bridge.lora.loras.LoRASources({"content": bridge.lora.loras.load("one/subject.safetensors", -0.5)})
    with torch.inference_mode():
        stacked, _ = bridge.apply.stack(model.patcher, None, sources, 0.8)
    found = changed(weights(model.patcher), weights(stacked))
    assert off(found, {key: -0.4 * delta for key, delta in wanted.items()}) < 1e-4


@pytest.mark.parametrize("make", [twins.sdxl, twins.flux])
def test_what_comes_out_of_a_layer_is_its_bias_too(pack, folder, make):
    """IA³: of fused layers each part, of turned ones in the host's order. What goes in is not."""
    model = make()
    layers = ["to_out.0", "to_q", "to_v", "norm_out.linear"] if make is twins.flux else ["to_out.0", "ff.net.2"]
    before = {name: p.detach().clone() for name, p in model.twin.named_parameters() if name.endswith(".bias")}
    state = model.patcher.model.state_dict()
    with torch.inference_mode():
        for name, target in model.targets.items():
            bias = before.get(name.removesuffix("weight") + "bias")
            if bias is not None:
                key, place, turned = (target, None, None) if isinstance(target, str) else (*target, None)[:3]
                whole = state[key.removesuffix("weight") + "bias"]
                (whole if place is None else whole.narrow(*place)).copy_(bias if turned is None else turned(bias))
    goes_in = [name for name in layers if name == "ff.net.2"]
    by_peft(model, folder, kind="IA3Config", feedforward_modules=goes_in, target_modules=layers)
    wanted = {}
    for name, after in model.twin.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if plain in before and not torch.equal(after.detach().float(), before[plain]):
            target = model.targets[plain.removesuffix("bias") + "weight"]
            key, place, turned = (target, None, None) if isinstance(target, str) else (*target, None)[:3]
            delta = after.detach().double() - before[plain].double()
            key = key.removesuffix("weight") + "bias"
            whole = wanted.setdefault(key, torch.zeros(state[key].shape, dtype=torch.float64))
            (whole if place is None else whole.narrow(*place)).copy_(delta if turned is None else turned(delta))
    bridge = pack.nodes.bridge
    fitting = bridge.lora.fitting.fit_one(bridge.lora.loras.load("one/subject.safetensors", 1.0), model.patcher.model)
    assert wanted and off({key: patch[1][0] for key, patch in fitting.passthrough.items()}, wanted) < 1e-6


def test_oft_without_its_configuration_counts_as_by_default(pack, folder):
    model = twins.sdxl()
    wanted = model.placed(by_peft(model, folder, **OFT))
    (folder / "adapter_config.json").unlink()
    found, notes = updates(pack, model.patcher)
    assert off(found, wanted) < 1e-6
    assert notes[0].startswith("'one/subject.safetensors' does not say how its OFT is computed: peft writes it into")


def test_what_the_configuration_says_is_in_the_digest(pack, folder):
    """A zip that is remembered is another one's where it says something else."""
    by_peft(twins.sdxl(), folder, **OFT)

    def digest() -> str:
        return pack.nodes.bridge.lora.loras.load("one/subject.safetensors", 1.0).config

    assert digest() == "", "defaults are nothing to tell"
    edit_config(folder, use_cayley_neumann=False)
    first = digest()
    edit_config(folder, use_cayley_neumann=True, num_cayley_neumann_terms=3)
    assert len({first, digest(), ""}) == 3
    edit_config(folder, num_cayley_neumann_terms=5, coft=True)
    assert digest() != ""
    edit_config(folder, peft_type="LORA")
    assert digest() == "", "another adapter's"


def test_vera_without_what_its_layers_share_is_refused(pack, folder):
    model = twins.sdxl()
    by_peft(model, folder, kind="VeraConfig", r=6, save_projection=False)
    with pytest.raises(pack.ziplora_core.files.LoRAFileError, match=r"VeRA without the matrices.*save_projection=True"):
        updates(pack, model.patcher)


def test_ia3_of_a_square_convolution_needs_its_configuration(pack, folder):
    model = twins.sdxl()
    by_peft(model, folder, **IA3, target_modules=["conv2"], beside=False)
    with pytest.raises(pack.ziplora_core.files.LoRAFileError, match=r"does not say whether IA³ scales.*conv2"):
        updates(pack, model.patcher)


@pytest.mark.parametrize(
    ("kind", "ending", "edit"),
    [
        ("OFT", ".oft_R.weight", lambda t: t[:-1]),
        ("OFT", ".oft_R.weight", lambda t: t[:, :-1]),
        ("OFT", ".oft_R.weight", lambda t: t.flatten()),
        ("IA³", ".ia3_l", lambda t: t[:-1]),
        ("VeRA", ".vera_lambda_b", lambda t: t[:-1]),
        ("VeRA", ".vera_lambda_d", lambda t: t[:-1]),
        ("AdaLoRA", ".lora_E", lambda t: t[:-1]),
    ],
)
def test_what_does_not_fit_is_refused(pack, folder, kind, ending, edit):
    model = twins.sdxl()
    by_peft(model, folder, **KINDS[kind])
    rewritten(folder, lambda tensors: {k: edit(t) if k.endswith(f"attn2.to_k{ending}") else t
                                       for k, t in tensors.items()})  # fmt: skip
    with pytest.raises(pack.ziplora_core.files.LoRAFileError, match=r"another model|broken"):
        updates(pack, model.patcher)


@pytest.mark.parametrize("said", [None, [1e30], [-1.0], [2.5], [1.0, 2.0], [3.0]])
def test_a_number_of_terms_that_cannot_be_is_none(pack, said):
    kinds = pack.ziplora_core.other_kinds
    assert kinds.terms_of(None if said is None else torch.tensor(said)) == (3 if said == [3.0] else 5)


@pytest.mark.parametrize("terms", [0, 1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("shared", [False, True])
def test_rotations_are_pefts(pack, terms, shared):
    """Its series has a turn of its own at three terms."""
    from peft.tuners.oft.layer import OFTRotationModule

    kinds = pack.ziplora_core.other_kinds
    module = OFTRotationModule(1 if shared else 3, 6, 4, 12, block_share=shared, use_cayley_neumann=terms > 0,
                               num_cayley_neumann_terms=terms)  # fmt: skip
    g = torch.Generator().manual_seed(0)
    module.weight = torch.nn.Parameter(torch.randn(module.weight.shape, generator=g, dtype=torch.float64) * 0.3)
    weight = torch.randn(5, 12, generator=g, dtype=torch.float64)
    with torch.no_grad():
        wanted = (module.get_weight() @ weight.T).T - weight
        torch.testing.assert_close(kinds.turned(weight, kinds.rotations(module.weight, terms)), wanted)
