"""A model beside its clone that is loaded: its layers have their own names, whatever the clone has put on it."""

from __future__ import annotations

import pytest
import test_unzip
import tiny
import torch
from test_hosts import one_step
from test_training import output, task, train  # noqa: F401

BLOCK = "diffusion_model.middle_block.1.transformer_blocks.0"


def compiled(name: str):
    """By an object patch, as other packs' nodes do it."""

    def clone(patcher):
        made = patcher.clone()
        part = patcher.model.get_submodule(name)
        made.add_object_patch(name, torch.compile(part, backend="eager"))
        return made

    return clone


@pytest.fixture(autouse=True)
def uncompiled():
    """What was compiled has its names and runs as it is: tracing would take longer than the tests."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def adapted(patcher):
    """Another pack's adapter as modules of a layer, injected when the host loads the model."""
    from comfy.patcher_extension import PatcherInjection

    layer = patcher.model.get_submodule(f"{BLOCK}.attn1.to_q")

    def inject(*_):
        g = torch.Generator().manual_seed(1)
        layer.lora_down, layer.lora_up = torch.nn.Linear(64, 2, bias=False), torch.nn.Linear(2, 64, bias=False)
        for part in (layer.lora_down, layer.lora_up):
            part.weight = torch.nn.Parameter(torch.randn(part.weight.shape, generator=g), requires_grad=False)
        original = layer.forward
        layer.forward = lambda x: original(x) + layer.lora_up(layer.lora_down(x))

    def eject(*_):
        del layer.lora_down, layer.lora_up, layer.forward

    made = patcher.clone()
    made.set_injections("other", [PatcherInjection(inject, eject)])
    return made


CLONES = {"compiled": compiled("diffusion_model"), "a compiled block": compiled(BLOCK), "an adapter": adapted}


@pytest.fixture(params=CLONES)
def both(request):
    """(plain model, its clone, which is loaded and wears its things, what that draws)."""
    patcher = tiny.tiny_patcher()
    clone = CLONES[request.param](patcher)
    drawn = tiny.sample(clone, steps=1)
    assert {*dict(patcher.model.named_modules())} != {*dict(tiny.tiny_patcher().model.named_modules())}
    return patcher, clone, drawn


def put_on(clone):
    import comfy.model_management as management

    management.load_models_gpu([clone])


def latents():
    return {c: made["samples"] for c, made in tiny.latents().items()}


def test_names_are_read_without_what_the_clone_wears(pack, both):
    """By each that reads them, as of a model that was never loaded; and the clone draws what it drew."""
    bridge, fresh = pack.nodes.bridge, tiny.tiny_patcher()
    pair = bridge.lora.fitting.fit(tiny.sources(pack, fresh.model), fresh.model).loras
    found = bridge.direct.merge(fresh, tiny.sources(pack, fresh.model), "sum")
    readers = {
        "files": lambda patcher: bridge.lora.keys.unet_keys(patcher.model),
        "training": lambda patcher: [
            bridge.training.layers.trained_layers(patcher.model, w) for w in bridge.training.layers.LAYERS
        ],
        "plan": lambda patcher: bridge.memory.rehearsal.rehearse(patcher, pair, tiny.prompts(), latents()),
        "unzip": lambda patcher: bridge.unzip.check(patcher.model, test_unzip.task(pack)),
        "apply": lambda patcher: list(bridge.apply.apply(patcher, None, found, 1.0)[0].patches),
    }
    for name, read in readers.items():
        expected = read(fresh)
        for patcher in both[:2]:
            put_on(both[1])
            assert read(patcher) == expected, name
    assert torch.equal(tiny.sample(both[1], steps=1), both[2]), "it wears its things again"


def zipped(pack, patcher):
    """One step of it."""
    return one_step(pack, patcher, tiny.sources(pack, tiny.tiny_patcher().model))[0]


def trained(pack, patcher):
    done = train(pack, patcher, task(pack, steps=1))
    return done.loss_map["loss"], list(done.lora_model)


@pytest.mark.parametrize("work", [zipped, trained])
def test_it_is_zipped_and_trained(pack, both, output, monkeypatch, work):  # noqa: F811
    """The plain one as a model that was never loaded. Memory is planned, not guessed."""
    monkeypatch.setattr(
        pack.nodes.bridge.memory.plan.logging, "warning", none_of(pack.nodes.bridge.memory.plan.logging.warning)
    )
    expected = work(pack, tiny.tiny_patcher())
    put_on(both[1])
    assert work(pack, both[0]) == expected
    put_on(both[1])
    found = work(pack, both[1])
    assert work is zipped or found[1] == expected[1]
    assert torch.equal(tiny.sample(both[1], steps=1), both[2])
    assert torch.equal(tiny.sample(both[0], steps=1), tiny.sample(tiny.tiny_patcher(), steps=1))


def none_of(warn):
    def say(text, *given):
        assert "could not be estimated" not in text, text % given
        warn(text, *given)

    return say


def test_models_that_are_not_asked_for_keep_what_they_wear(pack, both):
    """Another model is asked for its names; the loaded one stays as it is."""
    named = dict(both[0].model.named_modules())
    pack.nodes.bridge.network.bare.bare(tiny.tiny_patcher().model)
    assert dict(both[0].model.named_modules()).keys() == named.keys()
