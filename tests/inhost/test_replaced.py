"""A module's forward that is replaced for a while: whose it is before, meanwhile and after."""

from __future__ import annotations

import pytest
import torch


class Doubling(torch.nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.fixture
def replaced(pack):
    return pack.nodes.bridge.network.replaced


@pytest.mark.parametrize("own", ["none", "the class's", "another's"])
def test_a_module_has_its_forward_back(replaced, own):
    """As an attribute where it was one; another pack's, and only that, is one that was replaced."""
    module = Doubling()
    before = {"the class's": module.forward, "another's": lambda x: 3 * x}.get(own)
    if before is not None:
        module.forward = before
    assert replaced.is_replaced(module) == (own == "another's")
    ours = replaced.Replaced(module, lambda x: 5 * x)
    assert module(1) == 5 and replaced.is_replaced(module)
    ours.end()
    assert ours.restore() and module.__dict__.get("forward") is before
    assert module(1) == (3 if own == "another's" else 2)
    assert not ours.restore(), "once"


def test_a_wrapper_that_stays_for_longer_is_left_its_own(replaced):
    """And what it wraps leads through to the forward that was there before."""
    module = Doubling()
    ours = replaced.Replaced(module, lambda x: 5 * x)
    module.forward = over = lambda x: 10 + ours(x)
    assert module(1) == 15
    ours.end()
    assert not ours.restore() and module.forward is over and module(1) == 12
    module.forward = ours  # as the other pack takes its own off
    assert module(1) == 2 and "forward" not in vars(module), "the first call puts back what was there"
