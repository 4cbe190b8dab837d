"""Training-free merges against dense algebra."""

from __future__ import annotations

import pytest
import torch
from toys import toy_pair

from ziplora_core.direct import np_lora, row_space


def dense(factors):
    delta = factors.scale * torch.einsum("or,ri...->oi...", factors.up.double(), factors.down.double())
    return delta.flatten(1)


@pytest.mark.parametrize("mu", [0.0, 0.5, 1e9])
def test_np_lora_shrinks_content_in_the_rows_of_style(mu):
    pair = toy_pair()
    found = np_lora(pair, mu)
    for name, layer in pair.layers.items():
        if layer.content is None or layer.style is None:
            assert found.layers[name] is layer
            continue
        style = dense(layer.style)
        onto = torch.linalg.pinv(style) @ style  # the projector onto its row space
        expected = dense(layer.content) - mu / (1 + mu) * dense(layer.content) @ onto
        torch.testing.assert_close(dense(found.layers[name].content), expected, rtol=1e-5, atol=1e-6)
        assert found.layers[name].style is layer.style


def test_row_space_of_a_deficient_update():
    layer = toy_pair().layers["first"].style
    repeated = type(layer)(torch.cat([layer.up, layer.up], 1), torch.cat([layer.down, 2 * layer.down]), layer.scale)
    assert row_space(repeated).shape == row_space(layer).shape
