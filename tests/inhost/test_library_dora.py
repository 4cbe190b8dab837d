"""DoRA of libraries: what does not fit, what it takes of memory, and whose formula counts."""

from __future__ import annotations

import logging
import re

import pytest
import torch
import twins
from libraries import by_diffusers, by_lycoris, by_peft
from safetensors.torch import load_file, save_file
from test_apply import stock, weights
from test_library_files import R, folder, off, updates
from test_library_notes import changed

__all__ = ["folder"]  # a fixture
DORA = {**R, "use_dora": True}


def edited(folder, edit) -> str:
    """Changes one layer's matrices (name -> tensor) in a file; the layer's name in it."""
    path = folder / "subject.safetensors"
    tensors = load_file(path)
    layer = next(key for key in tensors if key.endswith("attn2.to_k.lora_A.weight")).removesuffix(".lora_A.weight")
    edit(tensors, layer)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return layer


def narrower(tensors, layer):
    tensors[f"{layer}.lora_A.weight"] = tensors[f"{layer}.lora_A.weight"][:, :-1]


def turned_round(tensors, layer):
    """As many numbers as the weight has, in other rows: torch would reshape them."""
    tensors[f"{layer}.lora_B.weight"] = tensors[f"{layer}.lora_B.weight"].repeat(2, 1)
    tensors[f"{layer}.lora_A.weight"] = tensors[f"{layer}.lora_A.weight"][:, ::2]


@pytest.mark.parametrize("edit", [narrower, turned_round])
def test_matrices_that_do_not_fit_are_refused(pack, folder, edit):
    """The host writes a line into its log and leaves the weight alone, of which DoRA would be made."""
    model = twins.sdxl()
    by_peft(model, folder, **DORA)
    edited(folder, edit)
    with pytest.raises(pack.ziplora_core.files.LoRAFileError, match=r"made for another model.*attn2.to_k"):
        updates(pack, model.patcher)


def test_what_only_the_hosts_log_says_is_no_update(pack):
    """Its adapter fails, and gives the weight back as it was."""
    from comfy.weight_adapter import LoRAAdapter

    g = torch.Generator().manual_seed(0)
    weight, up, down = (torch.randn(*shape, generator=g) for shape in ((8, 6), (8, 2), (2, 5)))
    update = pack.nodes.bridge.lora.dora.update
    assert update(LoRAAdapter(set(), (up, down, None, None, None, None)), torch.ones(8), weight, "layer") is None
    zero = LoRAAdapter(set(), (up * 0, torch.randn(2, 6, generator=g), None, None, None, None))
    found = update(zero, torch.ones(8), weight, "layer")
    torch.testing.assert_close(found, weight / weight.norm(dim=1, keepdim=True) - weight)


@pytest.mark.parametrize("said", ["CUDA out of memory.", "DefaultCPUAllocator: can't allocate memory: you tried to"])
@pytest.mark.parametrize("where", ["mm", "kron"])
def test_memory_that_runs_out_is_no_other_models_file(pack, folder, monkeypatch, said, where):
    """In the host's adapters, which catch every error and go on."""
    model = twins.sdxl()
    if where == "mm":
        by_peft(model, folder, **DORA)
    else:
        by_lycoris(model, folder, algo="lokr")

    def fails(*_, **__):
        raise RuntimeError(said)

    monkeypatch.setattr(torch, where, fails)
    before = list(logging.getLogger().handlers)
    with pytest.raises(
        MemoryError, match=r"not enough memory to compute the \w+ of 'one/subject.safetensors' at layer"
    ):
        updates(pack, model.patcher)
    assert logging.getLogger().handlers == before


def test_parts_of_fused_weights_share_their_memory(pack, folder):
    """One matrix for all weights of so many rows, and of each weight its update once: as the note counts it."""
    model = twins.flux()
    wanted = model.placed(
        by_diffusers(model, folder, **DORA, target_modules=["to_q", "to_k", "to_v", "proj_mlp", "add_k_proj"])
    )
    bridge = pack.nodes.bridge
    fitting = bridge.lora.fitting.fit_one(bridge.lora.loras.load("one/subject.safetensors", 1.0), model.patcher.model)
    state = model.patcher.model.state_dict()
    assert any("linear1" in key for key in wanted) and any("txt_attn.qkv" in key for key in wanted)
    for key, factors in fitting.factors.items():
        assert factors.down.shape == state[key].shape and factors.down.dtype == torch.float32
    ups = {factors.up.data_ptr(): factors.up for factors in fitting.factors.values()}
    assert len(ups) == len({len(state[key]) for key in wanted}) < len(wanted)
    held = sum(t.nbytes for t in ups.values()) + sum(state[key].numel() * 4 for key in wanted)
    told, note = fitting.notes()
    assert "count as they were trained" in told
    assert re.search(r"whole, (\d+) MB", note)[1] == f"{held / 1e6:.0f}"
    found, _ = updates(pack, model.patcher)
    assert off(found, wanted) < 1e-6


def test_weights_are_widened_on_the_cpu(pack, folder, monkeypatch):
    """Apple's GPUs have no float64."""

    class OnApple:
        def __init__(self, weight):
            self.weight = weight

        def narrow(self, *place):
            return OnApple(self.weight.narrow(*place))

        def to(self, device):
            if device != "cpu":
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support it")
            return self.weight

    model, bridge = twins.flux(), pack.nodes.bridge
    wanted = model.placed(by_diffusers(model, folder, **DORA, target_modules=["to_q", "norm_out.linear"]))
    base = bridge.lora.fitting.base_weight
    monkeypatch.setattr(bridge.lora.fitting, "base_weight", lambda *of: OnApple(base(*of)))
    assert off(updates(pack, model.patcher)[0], wanted) < 1e-6


def test_a_name_that_the_host_does_not_know_changes_no_other_layer(pack, folder):
    """Of a file whose DoRA the host reads: only what it skips is as trained."""
    model = twins.sdxl()
    trained = model.placed(by_lycoris(model, folder, algo="locon", dora_wd=True, preset="attn-only"))
    path = folder / "subject.safetensors"
    tensors = load_file(path)
    joined, dotted = (
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q",
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"),
    )
    key = model.targets[f"{dotted.removeprefix('unet.')}.weight"]
    assert any(name.startswith(f"{joined}.") for name in tensors)
    save_file({name.replace(f"{joined}.", f"{dotted}."): tensor for name, tensor in tensors.items()}, path)
    found, notes = updates(pack, model.patcher)
    hosts = changed(weights(model.patcher), weights(stock(model.patcher, load_file(path))))
    assert key not in hosts and off({key: found.pop(key)}, {key: trained[key]}) < 1e-6
    assert len(hosts) > 10 and off(found, hosts) < 1e-5
    assert any(note.startswith(f"{len(hosts)} layers of 'one/subject.safetensors' have a DoRA scale") for note in notes)


def test_a_scale_of_a_text_encoders_layers_is_told(pack, miniature, caplog):
    """The host's loader reads peft's in no text encoder: in the report, and in the log where it is put on a clip."""
    bridge = pack.nodes.bridge
    layer = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    file = {
        f"{layer}.lora_A.weight": torch.ones(2, 4),
        f"{layer}.lora_B.weight": torch.ones(4, 2),
        f"{layer}.lora_magnitude_vector": torch.ones(4),
    }

    def source(*leave_out):
        return bridge.lora.loras.LoRASource("mine", {k: t for k, t in file.items() if not k.endswith(leave_out)}, 1.0)

    says = "1 text-encoder layers of 'mine' are DoRA in peft's form, whose scale is not read"
    for given, told in ((source("no such"), True), (source("magnitude_vector"), False)):
        caplog.clear()
        lines = bridge.lora.text_encoders.notes(bridge.lora.loras.LoRASources({"content": given}), False)
        bridge.apply.with_text_encoder(miniature.clip, given, 1.0)
        assert any(says in line for line in lines) == (says in caplog.text) == told
