"""A thinned LoRA in the stock loader."""

from __future__ import annotations

import pytest
import tiny
import torch
from safetensors.torch import save_file
from test_apply import largest_difference, stock, weights
from test_saved import folders  # noqa: F401  a fixture


@pytest.fixture
def patcher(folders):  # noqa: F811
    patcher = tiny.tiny_patcher()
    lora = tiny.full_size.attention_lora(patcher.model, 4, 1, torch.float32)
    lora["lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha"] = torch.tensor(4.0)
    lora["lora_unet_out_2.diff_b"] = torch.ones(4)
    save_file(lora, folders / "loras" / "mine.safetensors")
    patcher.lora = lora
    return patcher


def test_everything_kept_is_the_lora(pack, patcher):
    lora, report = pack.nodes.bridge.sparse.sparsify(patcher, "mine.safetensors", 100.0)
    assert "100.0% of the energy" in report
    theirs, ours = weights(stock(patcher, patcher.lora)), weights(stock(patcher, lora))
    assert largest_difference(theirs, weights(patcher)) > 0.01
    assert largest_difference(theirs, ours) < 1e-3  # fp16


def test_a_tenth_changes_a_tenth_of_each_weight(pack, patcher):
    lora, report = pack.nodes.bridge.sparse.sparsify(patcher, "mine.safetensors", 10.0)
    assert "the largest 10 %" in report and "whole updates" in report
    before, after = weights(patcher), weights(stock(patcher, lora))
    changed = {k: (before[k] != after[k]).float().mean().item() for k in before}
    touched = {k: share for k, share in changed.items() if share and k != "out.2.bias"}
    assert len(touched) == sum(k.endswith(".diff") for k in lora) > 10
    assert all(0.05 < share <= 0.11 for share in touched.values())
    assert changed["out.2.bias"] == 1.0 and any(k.startswith("lora_te1") for k in lora)


@pytest.mark.parametrize("percent", [0.0, -1.0, 101.0, float("nan")])
def test_a_percentage_out_of_range_is_refused(pack, patcher, percent):
    with pytest.raises(ValueError, match="keep is .* up to 100"):
        pack.nodes.bridge.sparse.sparsify(patcher, "mine.safetensors", percent)


def test_what_a_file_sets_is_set(pack, patcher, folders):  # noqa: F811
    """A norm's weight and a bias that take the place of the model's own, under the host's names for them."""
    g = torch.Generator().manual_seed(5)
    patcher.lora["lora_unet_out_0.set_weight"] = torch.rand(32, generator=g)
    patcher.lora["diffusion_model.out.0.bias.set_weight"] = torch.rand(32, generator=g)
    save_file(patcher.lora, folders / "loras" / "sets.safetensors")
    lora, _ = pack.nodes.bridge.sparse.sparsify(patcher, "sets.safetensors", 100.0)
    theirs, ours = weights(stock(patcher, patcher.lora)), weights(stock(patcher, lora))
    before = weights(patcher)
    assert all(not torch.equal(theirs[name], before[name]) for name in ("out.0.weight", "out.0.bias"))
    assert largest_difference(theirs, ours) < 1e-3  # fp16


def test_numbers_too_large_for_fp16_are_kept(pack, patcher, folders):  # noqa: F811
    large = next(k for k in patcher.lora if k.endswith("attn1_to_q.lora_up.weight"))
    patcher.lora[large] = patcher.lora[large] * 1e7
    patcher.lora["no_such_layer.lora_up.weight"] = torch.zeros(2, 2)
    patcher.lora["no_such_layer.lora_down.weight"] = torch.zeros(2, 2)
    save_file(patcher.lora, folders / "loras" / "large.safetensors")
    lora, report = pack.nodes.bridge.sparse.sparsify(patcher, "large.safetensors", 100.0)
    assert all(bool(torch.isfinite(t).all()) for t in lora.values())
    assert "1 of the layers hold numbers too large for fp16 and are in fp32" in report
    assert "2 tensors of 'large.safetensors' fit no layer and are not used" in report
    theirs, ours = weights(stock(patcher, patcher.lora)), weights(stock(patcher, lora))
    for key, weight in theirs.items():
        torch.testing.assert_close(ours[key], weight, rtol=1e-3, atol=1e-3)


def test_an_update_beyond_fp32_is_refused_by_layer(pack, patcher, folders):  # noqa: F811
    for key in [k for k in patcher.lora if k.startswith("lora_unet_middle") and "attn1_to_q.lora_" in k]:
        patcher.lora[key] = torch.full_like(patcher.lora[key], 1e30)
    save_file(patcher.lora, folders / "loras" / "huge.safetensors")
    with pytest.raises(ValueError, match="'huge.safetensors': the update of layer '.*middle.*to_q.* is not finite"):
        pack.nodes.bridge.sparse.sparsify(patcher, "huge.safetensors", 10.0)
