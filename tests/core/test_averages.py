"""Means of trained weights against the recurrence written out."""

from __future__ import annotations

import pytest
import torch

from demo.training.averages import Averages


def test_means_follow_stand_in_the_weights_place_and_are_loaded_again() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    averages, expected = Averages([weight], most=0.5), torch.zeros(3)
    for step in range(30):
        with torch.no_grad():
            weight.fill_(step)
        averages.follow(step)
        keep = min(0.5, (step + 1) / (step + 10))
        expected = keep * expected + (1 - keep) * step
    torch.testing.assert_close(averages.values[0], expected)
    with pytest.raises(KeyError), averages.in_place():
        torch.testing.assert_close(weight.detach(), expected)
        raise KeyError
    assert weight.tolist() == [29.0] * 3, "also where the work in between fails"
    other = Averages([torch.nn.Parameter(torch.ones(3))], most=0.5)
    other.load({name: [t.clone() for t in tensors] for name, tensors in averages.state().items()})
    assert torch.equal(other.trained[0], weight) and torch.equal(other.values[0], averages.values[0])
