"""What a pass and a run promise about the model that a user gives them: measured against the host's own guider."""

from __future__ import annotations

import math

import oracle
import pytest
import tiny
import torch
from test_apply import stock


@pytest.fixture
def patcher():
    return tiny.tiny_patcher()


def zip_(pack, patcher, prompts=None, latents=None, sources=None, **settings):
    settings = pack.ziplora_core.solver.Settings(**{"solver": "layerwise", **settings})
    with torch.inference_mode():
        return pack.nodes.bridge.optimize.zipping.optimize(
            patcher,
            sources or tiny.sources(pack, patcher.model),
            prompts or tiny.prompts(),
            latents or tiny.latents(),
            settings,
        )


def with_predictor(pack, patcher, work, sources=None, prompts=None, latents=None, **how):
    """work(predict, joined, references, fitted), as a run hands them out."""
    bridge = pack.nodes.bridge
    fitted = bridge.lora.fitting.fit(sources or tiny.sources(pack, patcher.model), patcher.model)
    given = {c: v["samples"] for c, v in (latents or tiny.latents()).items()}
    with torch.inference_mode():
        bridge.network.predictor.with_predictor(
            patcher, fitted.loras, prompts or tiny.prompts(), given, lambda *parts: work(*parts, fitted), **how
        )


def two_sizes():
    with torch.inference_mode():
        return {
            "content": tiny.full_size.random_latents(8, 7),
            "style": {"samples": torch.randn(1, 4, 10, 6, generator=torch.Generator().manual_seed(8))},
        }


def other_packs(patcher, seen):
    """What other packs put on a model: a LoRA, a patch of attention, a function around the model."""
    patcher = stock(patcher, tiny.full_size.attention_lora(patcher.model, 4, 99, torch.float32), 0.7)

    def attention(q, k, v, extra_options):
        seen.setdefault("cond_or_uncond", set()).update(extra_options["cond_or_uncond"])
        return q * 1.5, k, v

    def around(apply_model, given):
        seen["wrapped"] = True
        assert len(given["cond_or_uncond"]) == len(given["input"])
        return 0.5 * apply_model(given["input"], given["timestep"], **given["c"]) + 0.1 * given["input"]

    patcher.set_model_attn1_patch(attention)
    patcher.set_model_unet_function_wrapper(around)
    return patcher


@pytest.mark.parametrize("with_others", [False, True], ids=["bare", "other packs' patches"])
def test_a_teacher_is_what_the_host_draws_with_that_lora(pack, patcher, with_others):
    """Prompts, picture sizes, latents and other packs' patches included, for each concept in its own pass."""
    seen, found = {}, {}
    sources, latents, prompts = tiny.sources(pack, patcher.model, strengths=(0.8, 1.3)), two_sizes(), tiny.prompts()
    model = other_packs(patcher, seen) if with_others else patcher
    batches = []

    def work(predict, joined, references, _):
        batches.extend(next(pack.ziplora_core.draws.spread_batches(references, predict, 3, 1)))
        for batch in batches:
            found[bool(batch.concept_index[0])] = predict(batch, joined.teacher(batch.concept_index)).clone()

    with_predictor(pack, model, work, sources, prompts, latents)
    assert len(batches) == 2
    if with_others:
        assert seen == {"cond_or_uncond": {0}, "wrapped": True}
    for batch in batches:
        concept = ("content", "style")[batch.concept_index[0]]
        source = sources.by_concept[concept]
        loras = [(source.tensors, source.strength)]
        at = (latents[concept]["samples"], batch.noise, int(batch.timesteps))
        expected = oracle.raw_prediction(model, prompts[concept], *at, loras)
        bare = oracle.raw_prediction(model, prompts[concept], *at)
        assert (expected - bare).norm() > 0.01 * bare.norm(), "the LoRA changes nothing: this tests nothing"
        difference = (found[bool(batch.concept_index[0])] - expected).norm() / (expected - bare).norm()
        assert difference < 1e-2, f"{concept}: {difference:.2e} of what the LoRA changes"


@pytest.mark.parametrize(("dtype", "scaled"), [(torch.float16, True), (torch.bfloat16, False), (torch.float32, False)])
def test_losses_are_scaled_in_half_precision_alone(pack, dtype, scaled):
    """Gradients of a mean over 65,536 outputs are below what fp16 can hold."""
    scales = []
    with_predictor(pack, tiny.tiny_patcher(dtype), lambda predict, *_: scales.append(predict.loss_scale))
    assert scales[0] >= 256 if scaled else scales == [1.0]


def test_a_run_is_on_a_clone(pack, patcher):
    """While it runs, what the user has is not what is patched, injected or made the model's current patcher."""
    current = []
    before = (dict(patcher.injections), dict(patcher.patches), dict(patcher.object_patches))

    def look(*_):
        current.append(patcher.model.current_patcher is patcher)
        assert (patcher.injections, patcher.patches, patcher.object_patches) == before

    hook = patcher.model.diffusion_model.register_forward_pre_hook(look)
    zip_(pack, patcher)
    hook.remove()
    assert current and not any(current)


def interrupted_backward(pack, patcher, struck: str, later: str) -> bool:
    """Stop in the backward pass, behind the output of module `struck`; whether the pass still came to `later`."""
    import comfy.model_management as management

    network, reached, hooks = patcher.model.diffusion_model, [], []

    def on_gradient(module, action):
        def forward(_, args, output):
            if torch.is_grad_enabled() and output.requires_grad:
                output.register_hook(lambda grad: action())

        hooks.append(network.get_submodule(module).register_forward_hook(forward))

    on_gradient(struck, management.interrupt_current_processing)
    on_gradient(later, lambda: reached.append(1))

    def work(predict, joined, references, fitted):
        flat = joined.flatten(pack.ziplora_core.coefficients.Coefficients.ones(fitted.loras)).requires_grad_()
        with torch.enable_grad():
            for batch in next(pack.ziplora_core.draws.spread_batches(references, predict, 0, 1)):
                predict(batch, joined.student(flat)).square().sum().backward()

    try:
        with pytest.raises(management.InterruptProcessingException):
            with_predictor(pack, patcher, work)
    finally:
        for hook in hooks:
            hook.remove()
    return bool(reached)


@pytest.mark.parametrize(
    ("struck", "later"),
    [
        ("middle_block.1.transformer_blocks.0.attn1.to_out.0", "middle_block.1.transformer_blocks.0.attn1.to_v"),
        ("out.2", "out.0"),
    ],
    ids=["linear", "convolution"],
)
def test_an_interrupt_stops_a_backward_pass_at_its_next_layer(pack, patcher, struck, later):
    assert not interrupted_backward(pack, patcher, struck, later)


def test_an_interrupt_stops_before_the_next_forward_pass(pack, patcher):
    import comfy.model_management as management

    begun = []

    def stop(*_):
        management.interrupt_current_processing()

    def work(predict, joined, references, _):
        for batches in pack.ziplora_core.draws.spread_batches(references, predict, 0, 3):
            for batch in batches:
                predict(batch, joined.teacher(batch.concept_index))

    network = patcher.model.diffusion_model
    hooks = network.register_forward_pre_hook(lambda *_: begun.append(1)), network.register_forward_hook(stop)
    with pytest.raises(management.InterruptProcessingException):
        with_predictor(pack, patcher, work)
    for hook in hooks:
        hook.remove()
    assert len(begun) == 1


@pytest.mark.parametrize("concept", ["content", "style"])
@pytest.mark.parametrize("key", ["area", "mask", "control", "gligen", "hooks"])
def test_prompts_that_a_teacher_cannot_have_are_refused(pack, patcher, key, concept):
    prompts = tiny.prompts()
    prompts[concept][0][1][key] = object()
    with pytest.raises(ValueError, match=f"{concept}_positive carries {key}"):
        zip_(pack, patcher, prompts)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda p: p["style"][0][1].update(start_percent=math.inf), "style_positive holds no usable numbers"),
        (
            lambda p: p["content"][0][1].update(pooled_output=torch.full((1, 1280), math.nan)),
            "content_positive holds no",
        ),
        (lambda p: p["style"].__setitem__(0, [torch.zeros(1, 7, 50), p["style"][0][1]]), "style_positive is 50 wide"),
    ],
    ids=["range", "NaN", "another model's width"],
)
def test_prompts_without_usable_numbers_are_named(pack, patcher, spoil, says):
    prompts = tiny.prompts()
    spoil(prompts)
    with pytest.raises(ValueError, match=says):
        zip_(pack, patcher, prompts)


@pytest.mark.parametrize("shape", [(1, 4, 8), (1, 4, 1, 1, 1, 8, 8)])
def test_latents_of_no_picture_are_named(pack, patcher, shape):
    latents = tiny.latents()
    latents["style"]["samples"] = torch.zeros(shape)
    with pytest.raises(ValueError, match="style_latents has shape .*; this model's latents have 4 channels"):
        zip_(pack, patcher, latents=latents)


def test_layers_that_cannot_be_zipped_are_named(pack, patcher):
    bridge = pack.nodes.bridge
    pair = bridge.lora.fitting.fit(tiny.sources(pack, patcher.model), patcher.model).loras
    layer = next(iter(pair.layers.values()))
    unknown = {"diffusion_model.out.0.weight": layer, "diffusion_model.no.weight": layer}
    strange = type(pair)(pair.concepts, {**pair.layers, **unknown})
    given = {c: v["samples"] for c, v in tiny.latents().items()}
    with torch.inference_mode(), pytest.raises(ValueError, match="2 layers of the pair .*'diffusion_model.no.weight'"):
        bridge.network.predictor.with_predictor(patcher, strange, tiny.prompts(), given, lambda *_: None)
    assert not any("forward" in vars(module) for module in patcher.model.modules())


def spoiled_after(patcher, steps: int):
    """From the pass with a gradient after so many on, the network draws NaN; the hook."""
    made = []

    def spoil(module, args, output):
        made.extend([1] * torch.is_grad_enabled())
        return output * math.nan if len(made) > steps else output

    return patcher.model.diffusion_model.register_forward_hook(spoil)


def test_a_zipped_pair_that_draws_nan_is_no_success(pack, patcher, monkeypatch):
    """However well it was solved: what it draws on held-out noise is NaN."""
    retention, measuring = pack.ziplora_core.retention, []
    real = retention.measure_retention

    def measure(*args, **given):
        measuring.append(1)
        try:
            return real(*args, **given)
        finally:
            measuring.pop()

    monkeypatch.setattr(retention, "measure_retention", measure)
    hook = patcher.model.diffusion_model.register_forward_hook(
        lambda module, args, output: output * math.nan if measuring else output
    )
    with pytest.raises(FloatingPointError, match="not finite"):
        zip_(pack, patcher)
    hook.remove()
