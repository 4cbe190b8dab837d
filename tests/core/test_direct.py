"""Training-free merges against dense algebra."""

from __future__ import annotations

import pytest
import torch
from toys import toy_pair

from ziplora_core.direct import METHODS, prepared
from ziplora_core.direct.np_lora import row_space, soften
from ziplora_core.lora_set import CONCEPTS, LoRASet


def dense(factors):
    delta = factors.scale * torch.einsum("or,ri...->oi...", factors.up.double(), factors.down.double())
    return delta.flatten(1)


@pytest.mark.parametrize("mu", [0.0, 0.5, 1e9])
def test_np_lora_shrinks_content_in_the_rows_of_style(mu):
    pair = toy_pair()
    found = soften(pair, mu)
    for name, layer in pair.layers.items():
        if len(layer) < 2:
            assert found.layers[name] is layer
            continue
        style = dense(layer["style"])
        onto = torch.linalg.pinv(style) @ style  # the projector onto its row space
        expected = dense(layer["content"]) - mu / (1 + mu) * dense(layer["content"]) @ onto
        torch.testing.assert_close(dense(found.layers[name]["content"]), expected, rtol=1e-5, atol=1e-6)
        assert found.layers[name]["style"] is layer["style"]


def test_row_space_of_a_deficient_update():
    layer = toy_pair().layers["first"]["style"]
    repeated = type(layer)(torch.cat([layer.up, layer.up], 1), torch.cat([layer.down, 2 * layer.down]), layer.scale)
    assert row_space(repeated).shape == row_space(layer).shape


def sdxl_pair() -> LoRASet:
    """One layer in each of SDXL's blocks that hold attention."""
    layer = toy_pair().layers["first"]
    blocks = ["input_blocks.4.1", "middle_block.1", *(f"output_blocks.{i}.1" for i in range(6))]
    names = [f"diffusion_model.{block}.transformer_blocks.0.attn1.to_q.weight" for block in blocks]
    return LoRASet(CONCEPTS, dict.fromkeys(names, layer))


@pytest.mark.parametrize(
    ("method", "content", "style", "rest"),
    [
        ("B-LoRA blocks", {"output_blocks.0"}, {"output_blocks.1"}, 0.0),
        (
            "UnZipLoRA blocks",
            {"output_blocks.0", "output_blocks.2"},
            {"output_blocks.1", "output_blocks.3", "output_blocks.4", "output_blocks.5"},
            1.0,
        ),
    ],
)
def test_blocks_go_to_one_concept(method, content, style, rest):
    pair, found = METHODS[method](sdxl_pair())
    for name in pair.layers:
        block = ".".join(name.split(".")[1:3])
        weights = (found["content"][name].unique().item(), found["style"][name].unique().item())
        assert weights == ((1.0, 0.0) if block in content else (0.0, 1.0) if block in style else (rest, rest)), name
    assert prepared(pair, method, {}) is pair


def test_block_presets_need_sdxl():
    with pytest.raises(ValueError, match="output_blocks.0.1.*block presets are for SDXL"):
        METHODS["B-LoRA blocks"](toy_pair())


def test_prepared_is_the_pair_that_a_methods_coefficients_belong_to():
    for method in ("sum", "NP-LoRA"):
        pair, found = METHODS[method](toy_pair())
        again = prepared(toy_pair(), method, METHODS[method].settings)
        for name, layer in pair.layers.items():
            for (_, mine), (_, theirs) in zip(layer.items(), again.layers[name].items(), strict=True):
                assert torch.equal(mine.down, theirs.down) and mine.rank == theirs.rank
        assert found.overlap() == 1.0
