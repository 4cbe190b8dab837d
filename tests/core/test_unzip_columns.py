"""UnZip's columns and mergers: who gets which, when, and at what rate they learn."""

from __future__ import annotations

import pytest
import torch

from ziplora_core import unzip
from ziplora_core.lora_set import Factors


def both(**changes):
    settings = unzip.Settings(**{"rank": 2, "steps": 7, "periods": 3, "share": 0.1, **changes})
    shapes = {"x": (6, 20), "y": (5, 10)}
    apart = unzip.Separations(columns=changes.get("similarity_lambda") is None)
    return unzip.UnZip(shapes, settings, apart, lambda name: torch.ones(shapes[name]))


def test_two_loras_begin_apart_and_their_mergers_have_a_rate_of_their_own():
    made = both(merger_rate=0.125)
    for name in ("x", "y"):
        assert torch.isin(made.trained["content"].down[name], made.trained["style"].down[name]).float().mean() < 0.01
    rates = {id(p): group["lr"] for group in made.groups(1e-3) for p in group["params"]}
    mergers = [m for by_layer in made.mergers.values() for m in by_layer.values()]
    assert len(mergers) == 4 and {rates[id(m)] for m in mergers} == {0.125}
    assert {rates[id(p)] for trained in made.trained.values() for p in trained.parameters()} == {1e-3}


def test_overlap_counts_mergers_of_opposite_signs():
    made, sizes = both(similarity_lambda=0.7), {}
    with torch.no_grad():
        for i, m in enumerate(made.mergers["content"].values()):
            m.copy_(torch.randn(len(m), generator=torch.Generator().manual_seed(i)))
    for name, m in made.mergers["content"].items():
        sizes[name] = sum(abs(v) for v in m.tolist()) / len(m)
    assert made.penalty().item() == pytest.approx(0.7 * (sizes["x"] + sizes["y"]) / 2)


def test_columns_are_given_out_at_the_start_of_each_period_and_not_after_the_last():
    made, probed = both(), []

    def probe():
        probed.append(step)
        x = {"x": torch.randn(3, 20), "y": torch.randn(3, 10)}
        sum((made.added(c, n, x[n]) - 1).square().sum() for c in unzip.CONCEPTS for n in x).backward()

    for step in range(7):
        made.before(step, probe)
    assert probed == [0, 2, 4], "seven steps in three periods: the last step is over"
    for concept in unzip.CONCEPTS:
        assert {n: int(m.sum()) for n, m in made.masks[concept].items()} == {"x": 6, "y": 3}


def test_all_columns_are_on_while_they_are_scored_and_only_a_loras_own_afterwards():
    made, seen = both(), []
    with torch.no_grad():
        for trained in made.trained.values():
            for up in trained.up.values():
                up.fill_(1.0)

    def on(concept, name):
        """Columns of whose input a LoRA takes notice."""
        return made.added(concept, name, torch.eye(made.masks[concept][name].numel())).detach().any(1)

    def probe():
        seen.extend(on(concept, name).all().item() for concept in unzip.CONCEPTS for name in ("x", "y"))
        x = {"x": torch.ones(3, 20), "y": torch.ones(3, 10)}
        sum(made.added(c, n, x[n]).square().sum() for c in unzip.CONCEPTS for n in x).backward()

    made.before(0, probe)
    assert seen == [True] * 4
    for concept in unzip.CONCEPTS:
        for name, mask in made.masks[concept].items():
            assert torch.equal(on(concept, name), mask) and 0 < int(mask.sum()) < len(mask)


def test_the_best_columns_are_given_out_first():
    """Those of a layer's own ordering: content takes the best, style the best of what is left."""
    made = both(periods=1, share=0.2)

    def probe():
        for trained in made.trained.values():
            for name, up in trained.up.items():
                trained.down[name].grad = torch.zeros_like(trained.down[name])
                up.grad = torch.ones_like(up)

    with torch.no_grad():
        for trained in made.trained.values():
            for down in trained.down.values():
                down.copy_((torch.arange(down.shape[1]) * 7 % 10 + torch.arange(down.shape[1]) / 100).expand_as(down))
    made.before(0, probe)
    for name, columns in (("x", 20), ("y", 10)):
        order = sorted(range(columns), key=lambda j: j * 7 % 10 + j / 100, reverse=True)
        count = round(0.2 * columns)
        for concept, best in (("content", order[:count]), ("style", order[count : 2 * count])):
            assert made.masks[concept][name].nonzero().flatten().tolist() == sorted(best)


def test_two_loras_go_on_at_any_scale():
    made, fresh = both(), both()
    halves = {}
    for concept, trained in made.trained.items():
        with torch.no_grad():
            for up in trained.up.values():
                up.normal_()
        halves[concept] = {n: Factors(f.up * 4, f.down, 0.25) for n, f in trained.factors().items()}
    fresh.load(halves)
    for concept, trained in made.trained.items():
        for name, up in trained.up.items():
            assert torch.equal(fresh.trained[concept].up[name], up)
    with torch.no_grad():
        made.trained["style"].up["y"].mul_(100)
    assert made.largest() == "y (style)"
    assert both().largest() is None
