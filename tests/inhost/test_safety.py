"""Optimising changes nothing that came in: not after success, an interrupt or an exception, in forward or backward."""

from __future__ import annotations

import pytest
import tiny
import torch

STEPS = 3


def optimise(pack, patcher, prompts=None, latents=None, steps=STEPS):
    settings = pack.ziplora_core.solver.Settings(steps=steps, solver="layerwise, then gradient")
    with torch.inference_mode():
        return pack.nodes.bridge.optimize.zipping.optimize(
            patcher, tiny.sources(pack, patcher.model), prompts or tiny.prompts(), latents or tiny.latents(), settings
        )


def left_behind(patcher) -> list[str]:
    """Modules whose forward is not their class's any more, or that carry a hook."""
    return [
        name
        for name, module in patcher.model.named_modules()
        if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    ]


@pytest.fixture
def patcher():
    return tiny.tiny_patcher()


@pytest.mark.smoke
def test_same_samples_after_success(pack, patcher):
    prompts, latents = tiny.prompts(), tiny.latents()
    kept = {c: (prompts[c][0][0].clone(), latents[c]["samples"].clone()) for c in prompts}
    flags = [p.requires_grad for p in patcher.model.parameters()]
    before = tiny.sample(patcher)
    zipped, losses, *_ = optimise(pack, patcher, prompts, latents)
    assert len(losses["loss"]) == STEPS and zipped.coefficients.overlap() < 1.0
    assert left_behind(patcher) == [] and patcher.patches == {} and patcher.injections == {}
    assert all(p.grad is None for p in patcher.model.parameters())
    assert torch.equal(tiny.sample(patcher), before)
    assert [p.requires_grad for p in patcher.model.parameters()] == flags
    for c, (context, samples) in kept.items():
        assert torch.equal(prompts[c][0][0], context) and torch.equal(latents[c]["samples"], samples)


def disturb(patcher, how: str, call: int):
    """At the given call of a middle layer: interrupt or raise, in its forward or in its backward."""
    import comfy.model_management as management

    layer = patcher.model.diffusion_model.middle_block[1].transformer_blocks[0].attn1.to_out[0]
    calls = []

    def strike(*_):
        if "interrupt" in how:
            management.interrupt_current_processing()
        else:
            raise RuntimeError("struck")

    def before(module, args):
        calls.append(1)
        if len(calls) == call:
            strike()

    def after(module, args, output):
        if output.requires_grad:
            calls.append(1)
            if len(calls) == call:
                output.register_hook(strike)

    return layer.register_forward_hook(after) if "backward" in how else layer.register_forward_pre_hook(before)


@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize(
    "how", ["interrupt in forward", "interrupt in backward", "error in forward", "error in backward"]
)
def test_same_samples_after_trouble(pack, patcher, how, call):
    import comfy.model_management as management

    before = tiny.sample(patcher)
    handle = disturb(patcher, how, call)
    expected = management.InterruptProcessingException if "interrupt" in how else RuntimeError
    with pytest.raises(expected):
        optimise(pack, patcher)
    handle.remove()
    assert left_behind(patcher) == [] and patcher.injections == {}
    assert torch.equal(tiny.sample(patcher), before)
    _, losses, *_ = optimise(pack, patcher)
    assert len(losses["loss"]) == STEPS, "the next run works"


def test_interrupt_stops_within_a_step(pack, patcher):
    """Struck in the backward pass of the second step, no further UNet call is made."""
    import comfy.model_management as management

    calls = []
    counter = patcher.model.diffusion_model.register_forward_pre_hook(lambda *_: calls.append(1))
    handle = disturb(patcher, "interrupt in backward", 2)
    with pytest.raises(management.InterruptProcessingException):
        optimise(pack, patcher, steps=50)
    handle.remove()
    counter.remove()
    assert len(calls) == 8 + 8 + 4, "eight for the layer-wise start, eight for what the direct merge loses, two a step"


def test_same_seed_gives_the_same_bits(pack, patcher):
    a, b = optimise(pack, patcher)[0].coefficients, optimise(pack, patcher)[0].coefficients
    assert all(torch.equal(m, b[c][k]) for c in ("content", "style") for k, m in a[c].items())


def test_checkpointed_blocks_give_the_same_coefficients(pack, patcher):
    bridge, core = pack.nodes.bridge, pack.ziplora_core
    fitted = bridge.lora.fitting.fit(tiny.sources(pack, patcher.model), patcher.model)
    found = []
    for recomputed in (0, 2, 99):
        with torch.inference_mode():
            bridge.network.predictor.with_predictor(
                patcher,
                fitted.loras,
                tiny.prompts(),
                {c: v["samples"] for c, v in tiny.latents().items()},
                lambda predict, joined, refs: found.append(
                    core.gradient.optimize(joined, predict, refs, core.solver.Settings(steps=2)).coefficients
                ),
                recomputed=recomputed,
            )
    assert all(torch.equal(found[0]["style"][k], other["style"][k]) for other in found[1:] for k in found[0]["style"])
    assert left_behind(patcher) == []


def test_prompts_of_different_length_and_references_of_different_size(pack, patcher):
    with torch.inference_mode():
        prompts = {
            "content": tiny.full_size.random_prompt(0, tokens=77, width=96),
            "style": tiny.full_size.random_prompt(1, tokens=154, width=96),
        }
        latents = {
            "content": tiny.full_size.random_latents(8, 0, count=3),
            "style": tiny.full_size.random_latents(16, 1),
        }
    for given in ((prompts, None), (None, latents), (prompts, latents)):
        _, losses, *_ = optimise(pack, patcher, *given, steps=1)
        assert len(losses["loss"]) == 1


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda p, x: x["style"].update(samples=torch.zeros(1, 16, 8, 8)), "style_latents.*4 channels"),
        (lambda p, x: x["content"].update(samples=torch.full((1, 4, 8, 8), float("nan"))), "content_latents.*NaN"),
        (lambda p, x: p["style"].append(p["style"][0]), "style_positive holds 2 prompts"),
        (lambda p, x: p["content"][0][1].update(area=(8, 8, 0, 0)), "content_positive carries area"),
    ],
)
def test_what_cannot_be_used_is_named_before_anything_is_loaded(pack, patcher, spoil, says):
    import comfy.model_management as management

    prompts, latents = tiny.prompts(), tiny.latents()
    spoil(prompts, latents)
    management.unload_all_models()
    with pytest.raises(ValueError, match=says):
        optimise(pack, patcher, prompts, latents)
    assert management.loaded_models() == []
