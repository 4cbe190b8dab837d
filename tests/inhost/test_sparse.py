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
