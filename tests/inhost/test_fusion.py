"""Solver fusion through the node: what hooks see of the host's own layers, the stock loader, files."""

from __future__ import annotations

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_apply import largest_difference, stock, weights
from test_stack import ROLES, THREE, folder, patcher, references, stacked  # noqa: F401

SETTINGS = {"steps": 10, "learning_rate": 0.01, "similarity_lambda": 0.01, "batch_size": 1, "seed": 0}
PAIR, PAIR_ROLES = THREE[1:], "subject, style"


def fused(pack, patcher, stack, roles, **changed):  # noqa: F811
    sources = pack.nodes.stack.LoadLoRAStack.execute(stack, roles).args[0]
    prompts, latents = tiny.prompts(), tiny.latents()
    chain = {"references": references(pack, 1)} if len(stack) > 2 else {}
    with torch.inference_mode():
        return pack.nodes.ZipLoRAOptimize.execute(
            patcher, sources, prompts["content"], prompts["style"], latents["content"], latents["style"],
            **{**SETTINGS, "solver": "fusion", **changed}, **chain,
        )  # fmt: skip


@pytest.mark.parametrize(("stack", "roles"), [(PAIR, PAIR_ROLES), (THREE, ROLES)], ids=["two", "three"])
def test_it_is_least_squares_on_what_hooks_see(pack, patcher, folder, stack, roles):  # noqa: F811
    """From updates as the stock loader writes them, and inputs that hooks of the test's own took in the same passes."""
    network, passes = patcher.model.diffusion_model, pack.ziplora_core.layerwise.DRAWS
    seen = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, given, name=name: seen.setdefault(name, []).append(given[0].detach().clone())
        )
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    try:
        zipped = fused(pack, patcher, stack, roles).args[0]
    finally:
        for hook in hooks:
            hook.remove()
    bare, concepts = weights(patcher), list(zipped.sources.by_concept)
    alone = {
        c: weights(stock(patcher, source.tensors, source.strength)) for c, source in zipped.sources.by_concept.items()
    }
    ours = weights(pack.nodes.bridge.apply.apply(patcher, None, zipped, 1.0)[0])
    moved = 0.0
    names = {name.removeprefix("diffusion_model.") for name in zipped.routing}
    assert len(names) == len(zipped.fitted.loras.layers) > 20
    for name in names:
        rows = seen[name.removesuffix(".weight")][:passes]
        assert all(len(x) == len(concepts) for x in rows), "each reference has a row of a pass"
        x = {c: torch.cat([x[place].flatten(0, -2) for x in rows]).double() for place, c in enumerate(concepts)}
        updates = {c: (alone[c][name] - bare[name]).double() for c in concepts}
        moments = {c: of.T @ of / len(of) * passes for c, of in x.items()}
        whole = sum(moments.values())
        whole += pack.ziplora_core.fusion.RIDGE * whole.trace() / len(whole) * torch.eye(len(whole)).double()
        expected = torch.linalg.solve(whole, sum(updates[c] @ m for c, m in moments.items()).T).T
        found = (ours[name] - bare[name]).double()
        assert (found - expected).norm() < 1e-3 * expected.norm(), name
        moved = max(moved, float((expected - sum(updates.values())).norm() / expected.norm()))
    assert moved > 0.1, "near the sum the comparison shows little"


def test_it_is_applied_saved_and_exported_as_one(pack, patcher, folder):  # noqa: F811
    """A file is loaded as it was drawn, and its export by the stock loader, at dials too."""
    result = fused(pack, patcher, PAIR, PAIR_ROLES)
    zipped, bridge = result.args[0].dialled({"style": 0.5}), pack.nodes.bridge
    layers = len(zipped.fitted.loras.layers)
    assert zipped.method == "fused" and f"{layers} layers are fused" in result.args[2]
    assert "solver: fusion, seed 0; fused layer by layer, in closed form" in result.args[2]
    ours = weights(bridge.apply.apply(patcher, None, zipped, 1.0)[0])
    full = weights(bridge.apply.apply(patcher, None, result.args[0], 1.0)[0])
    assert largest_difference(ours, full) > 0.01, "the dial does nothing"
    again = bridge.saved.load(patcher, bridge.saved.save(zipped, "fused"))
    assert again.method == "fused" and again.routing.keys() == zipped.routing.keys()
    assert largest_difference(weights(bridge.apply.apply(patcher, None, again, 1.0)[0]), ours) == 0
    _, _, name = bridge.export.export_file(zipped, "fused", 0, "fp32", "kohya")
    exported = load_file(folder / "output" / name)
    ranks = {len(t) for key, t in exported.items() if key.endswith("lora_down.weight")}
    assert ranks == {sum(factors.rank for factors in layer.values()) for layer in zipped.fitted.loras.layers.values()}
    assert largest_difference(weights(stock(patcher, exported)), ours) < 1e-4
    panels = pack.nodes.ZippedLoRAReport.execute(zipped, "a picture for each panel").args[0]
    assert len(panels) == len(pack.nodes.figures.PANELS)


def test_layers_in_rounds_are_the_same_merge(pack, patcher, folder, monkeypatch):  # noqa: F811
    """With room for some layers only, and queries, keys and values of one input together."""
    fusion = pack.ziplora_core.fusion
    at_once = fused(pack, patcher, PAIR, PAIR_ROLES).args[0]
    rounds = []

    class Counted(fusion.Moments):
        def __init__(self, names, room):
            super().__init__(names, room)
            rounds.append(self)
            self.opened = {}

        def open(self, name, *given):
            found = super().open(name, *given)
            if found is not None:
                self.opened[name] = found.inputs
            return found

    monkeypatch.setattr(fusion, "Moments", Counted)
    monkeypatch.setattr(fusion, "ROOM", 200_000)
    again = fused(pack, patcher, PAIR, PAIR_ROLES, drawn_size=72).args[0]  # which is not remembered as the same
    assert len(rounds) > 2 and again.routing.keys() == at_once.routing.keys()
    for name, downs in at_once.routing.items():
        torch.testing.assert_close(again.routing[name], downs, rtol=1e-3, atol=1e-5)
    shared = 0
    for opened in (one.opened for one in rounds):
        for name in [name for name in opened if name.endswith("attn1.to_q.weight")]:
            for other in (name.replace("to_q", of) for of in ("to_k", "to_v")):
                assert opened.get(other, opened[name]) is opened[name]
                shared += other in opened
        assert len({id(inputs) for name, inputs in opened.items() if ".attn2.to_k" in name}) <= 1, "one text for all"
    assert shared
