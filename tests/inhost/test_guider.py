"""Two-Scale Guider against the host's own guiders, of models that the stock loader has put a LoRA on."""

from __future__ import annotations

import re

import gguf_like
import pytest
import tiny
import torch
from test_apply import largest_difference, stock, weights, zip_pair
from test_hosts import coded_forms, coded_model

SIGMAS = (9.0, 1.5, 0.2)


@pytest.fixture(scope="module")
def patcher():
    return tiny.tiny_patcher()


@pytest.fixture(scope="module")
def lora(patcher):
    return tiny.full_size.attention_lora(patcher.model, 4, 3, torch.float32)


def drawn_by(guider, sampler, sigmas=SIGMAS) -> torch.Tensor:
    with torch.inference_mode():
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        return guider.sample(
            noise, torch.zeros(1, 4, 8, 8), sampler, torch.tensor([*sigmas, 0.0]), disable_pbar=True, seed=1
        )


def predictions(guider) -> list[torch.Tensor]:
    """What a guider predicts of one and the same noisy latents at each of SIGMAS."""
    import comfy.samplers

    found = []

    def look(model, x, sigmas, extra_args=None, **_):
        for sigma in sigmas[:-1]:
            given = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(x) * (1 + sigma**2) ** 0.5
            found.append(model(given, sigma * x.new_ones(len(x)), **(extra_args or {})).clone())
        return x

    drawn_by(guider, comfy.samplers.KSAMPLER(look))
    return found


def host(model, positive, negative=None, cfg=1.0):
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative or positive)
    guider.set_cfg(cfg)
    return guider


def ours(pack, model, adapted, text, style, own=None):
    prompts = tiny.prompts()
    with torch.inference_mode():
        return pack.nodes.TwoScaleGuider.execute(
            model, adapted, prompts["content"], prompts["style"], text, style, own
        ).args[0]


def adapted_by(pack, patcher, lora, how: str):
    """(the base, the same with an adapter)"""
    if how == "a LoRA":
        return patcher, stock(patcher, lora, 0.8)
    if how == "two LoRAs":
        other = tiny.full_size.attention_lora(patcher.model, 2, 8, torch.float32)
        return patcher, stock(stock(patcher, lora, 0.8), other, -0.5)
    if how == "a LoRA beside one that both have":
        base = stock(patcher, tiny.full_size.attention_lora(patcher.model, 2, 8, torch.float32), 0.7)
        return base, stock(base, lora, 0.8)
    zipped = zip_pair(pack, patcher, tiny.sources(pack, patcher.model))
    return patcher, pack.nodes.bridge.apply.apply(patcher, None, zipped, 2.0)[0]


@pytest.mark.parametrize("scales", [(6.0, 3.0), (2.0, 5.0), (4.0, 4.0), (1.0, 2.0), (1.0, 1.0), (3.0, 0.0)])
@pytest.mark.parametrize("how", ["a LoRA", "two LoRAs", "a LoRA beside one that both have", "a zipped pair"])
def test_it_is_the_formula_of_three_predictions(pack, patcher, lora, how, scales):
    """Each from the host's guider of a single prompt, on a model that the stock loader or Apply Zipped LoRA made."""
    base, adapted = adapted_by(pack, patcher, lora, how)
    prompts, (text, style) = tiny.prompts(), scales
    uncond, plain = predictions(host(base, prompts["style"])), predictions(host(base, prompts["content"]))
    styled = predictions(host(adapted, prompts["content"]))
    found = predictions(ours(pack, base, adapted, text, style))
    assert len(found) == len(SIGMAS)
    for n, b, a, mine in zip(uncond, plain, styled, found, strict=True):
        assert (a - b).norm() > 0.01 * b.norm() and (b - n).norm() > 0.01 * b.norm(), "nothing to tell apart"
        torch.testing.assert_close(mine, n + text * (b - n) + style * (a - b), rtol=1e-3, atol=1e-3)


def test_the_adapted_model_may_have_a_prompt_of_its_own(pack, patcher, lora):
    adapted, prompts = stock(patcher, lora), tiny.prompts()
    with torch.inference_mode():
        own = tiny.full_size.random_prompt(9, width=96)
    found = predictions(ours(pack, patcher, adapted, 1.0, 1.0, own))
    for mine, expected in zip(found, predictions(host(adapted, own)), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-3)
    others = predictions(host(adapted, prompts["content"]))
    assert max(float((mine - other).abs().max()) for mine, other in zip(found, others, strict=True)) > 0.01


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m", "dpmpp_sde", "heun", "uni_pc", "ddim"])
def test_any_sampler_draws_with_it(pack, patcher, lora, sampler):
    """Without style, what the host's own guidance draws; with it, something else."""
    import comfy.samplers

    adapted, prompts = stock(patcher, lora), tiny.prompts()
    draw = comfy.samplers.sampler_object(sampler)
    expected = drawn_by(host(patcher, prompts["content"], prompts["style"], 4.0), draw)
    torch.testing.assert_close(drawn_by(ours(pack, patcher, adapted, 4.0, 0.0), draw), expected, rtol=1e-4, atol=1e-4)
    styled = drawn_by(ours(pack, patcher, adapted, 4.0, 2.0), draw)
    assert styled.isfinite().all() and (styled - expected).abs().max() > 0.01


def test_the_hosts_sampling_node_takes_it(pack, patcher, lora):
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import Noise_RandomNoise, SamplerCustomAdvanced

    guider = ours(pack, patcher, stock(patcher, lora), 4.0, 2.0)
    with torch.inference_mode():
        given = Noise_RandomNoise(1), guider, comfy.samplers.sampler_object("euler"), torch.tensor([*SIGMAS, 0.0])
        latent = {"samples": torch.zeros(1, 4, 8, 8)}
        first, again = (SamplerCustomAdvanced.execute(*given, latent).args[0]["samples"] for _ in range(2))
    assert torch.equal(first, again) and first.abs().max() > 0.01


@pytest.mark.parametrize(("scales", "rows"), [((6.0, 3.0), 3), ((4.0, 4.0), 2), ((1.0, 1.0), 1), ((3.0, 0.0), 2)])
def test_what_a_scale_makes_needless_is_not_run(pack, patcher, lora, scales, rows):
    guider, seen = ours(pack, patcher, stock(patcher, lora), *scales), []
    guider.model_options["model_function_wrapper"] = lambda apply_model, given: (
        seen.append(len(given["input"])) or apply_model(given["input"], given["timestep"], **given["c"])
    )
    predictions(guider)
    assert sum(seen) == rows * len(SIGMAS)


def test_functions_of_other_packs_on_guidance_are_heard(pack, patcher, lora):
    asked = []

    def after(given):
        asked.append(given["cond_scale"])
        return given["denoised"] * 0

    base = patcher.clone()
    base.set_model_sampler_post_cfg_function(after)
    found = predictions(ours(pack, base, stock(base, lora), 4.0, 4.0))
    assert asked == [4.0] * len(SIGMAS) and not any(bool(one.any()) for one in found)


def test_another_packs_way_of_guidance_and_of_running_the_model_stays(pack, patcher, lora):
    """A node before ours has replaced both, as rescaling and block-swapping packs do."""

    def halved(apply_model, given):
        return apply_model(given["input"], given["timestep"], **given["c"]) * 0.5

    def rescaled(given):
        return given["uncond"] + 0.7 * given["cond_scale"] * (given["cond"] - given["uncond"])

    plain, base, prompts = patcher.clone(), patcher.clone(), tiny.prompts()
    for model in (plain, base):
        model.set_model_unet_function_wrapper(halved)
    base.set_model_sampler_cfg_function(rescaled, disable_cfg1_optimization=True)
    guided = predictions(host(base, prompts["content"], prompts["style"], 4.0))
    before = predictions(host(plain, prompts["content"]))
    styled = predictions(host(stock(plain, lora), prompts["content"]))
    found = predictions(ours(pack, base, stock(base, lora), 4.0, 2.0))
    for text, b, a, mine in zip(guided, before, styled, found, strict=True):
        torch.testing.assert_close(mine, text + 2.0 * (a - b), rtol=1e-3, atol=1e-3)


def test_it_guides_a_model_that_k_lora_is_on(pack, patcher, lora):
    base = pack.nodes.bridge.k_lora.put_on(patcher, None, tiny.sources(pack, patcher.model), 1.5, 0.5)[0]
    prompts, adapted = tiny.prompts(), stock(base, lora)
    parts = (host(base, prompts["style"]), host(base, prompts["content"]), host(adapted, prompts["content"]))
    for n, b, a, mine in zip(*map(predictions, parts), predictions(ours(pack, base, adapted, 5.0, 2.0)), strict=True):
        torch.testing.assert_close(mine, n + 5.0 * (b - n) + 2.0 * (a - b), rtol=1e-3, atol=1e-3)


def test_what_other_packs_have_put_on_both_models_is_no_difference(pack, patcher, lora):
    """Also objects, of which the host gives every clone a copy."""

    class Patch:
        def __call__(self, *given):
            return given[:2]

    base = patcher.clone()
    base.set_model_output_block_patch(Patch())
    base.set_model_patch_replace(Patch(), "attn2", "middle", 0)
    base.model_options["transformer_options"]["another pack's"] = torch.ones(2)
    assert ours(pack, base, stock(base, lora), 4.0, 2.0) is not None


def test_both_models_stay_as_they_are(pack, patcher, lora):
    adapted = stock(patcher, lora)
    before = [(model.patches_uuid, weights(model)) for model in (patcher, adapted)]
    predictions(ours(pack, patcher, adapted, 6.0, 3.0))
    for model, (uuid, were) in zip((patcher, adapted), before, strict=True):
        assert model.patches_uuid == uuid and not model.hook_patches
        assert largest_difference(weights(model), were) == 0
    with pytest.raises(RuntimeError, match="stopped"):
        guider = ours(pack, patcher, adapted, 6.0, 3.0)
        guider.model_options["model_function_wrapper"] = lambda *_: (_ for _ in ()).throw(RuntimeError("stopped"))
        predictions(guider)
    assert largest_difference(weights(patcher), before[0][1]) == 0


def test_models_that_are_not_one_are_refused(pack, patcher, lora):
    adapted = stock(patcher, lora)
    other = tiny.full_size.attention_lora(patcher.model, 2, 8, torch.float32)
    moved = adapted.clone()
    moved.add_object_patch("model_sampling", patcher.model.model_sampling)
    merged = patcher.clone()
    key, weight = next(iter(patcher.model.diffusion_model.state_dict().items()))
    merged.add_patches({f"diffusion_model.{key}": (weight,)}, 0.5, 0.5)
    switched = pack.nodes.bridge.k_lora.put_on(patcher, None, tiny.sources(pack, patcher.model), 1.5, 0.5)[0]
    wrapped = stock(patcher, lora)
    wrapped.add_wrapper_with_key("apply_model", "another pack's", lambda executor, *given, **more: None)
    freed, rescaled, again = stock(patcher, lora), stock(patcher, lora), stock(patcher, lora)
    freed.set_model_output_block_patch(lambda h, skip, options: (h, skip))
    rescaled.set_model_sampler_cfg_function(lambda given: given["cond"])
    again.set_model_sampler_post_cfg_function(lambda given: given["denoised"])
    not_a_lora = "adapted_model is not model with a LoRA on it"
    for base, second, says in (
        (patcher, tiny.tiny_patcher(), "adapted_model is of another checkpoint loader"),
        (patcher, patcher.clone(), "adapted_model has the weights of model: put the LoRA on it"),
        (adapted, patcher, not_a_lora),
        (stock(patcher, other), adapted, not_a_lora),
        (patcher, moved, not_a_lora),
        (patcher, merged, not_a_lora),
        (patcher, switched, not_a_lora),
        (patcher, wrapped, not_a_lora),
        (patcher, freed, not_a_lora),
        (patcher, rescaled, not_a_lora),
        (rescaled, stock(again, lora), not_a_lora),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            ours(pack, base, second, 6.0, 3.0)
    with pytest.raises(ValueError, match="style_scale"):
        ours(pack, patcher, adapted, 6.0, -1.0)
    with pytest.raises(ValueError, match="adapted_model is not connected"):
        ours(pack, patcher, None, 6.0, 3.0)


@pytest.mark.parametrize("name", ["positive", "negative", "adapted_positive"])
def test_what_is_no_conditioning_is_refused(pack, patcher, lora, name):
    prompts = {"positive": [], "negative": [], "adapted_positive": None, name: "../x"}
    with pytest.raises(ValueError, match=f"^{name} is no conditioning"):
        pack.nodes.TwoScaleGuider.execute(patcher, stock(patcher, lora), text_scale=1.0, style_scale=1.0, **prompts)


@pytest.mark.parametrize("form", [*coded_forms(), "GGUF"])
def test_a_model_of_coded_weights_draws_as_with_the_stock_loader_or_is_refused(pack, lora, form):
    """The host's hooks add a LoRA to the numbers as they lie in memory, and of a misfit it only writes to its log."""
    with torch.inference_mode():
        base = gguf_like.patcher_like(tiny.tiny_patcher()) if form == "GGUF" else coded_model(form)[0]
    adapted = stock(base, lora, 0.8)
    if form != "scaled fp8":
        with pytest.raises(ValueError, match="weights are quantized.*load the checkpoint in fp16"):
            ours(pack, base, adapted, 1.0, 1.0)
        return
    prompts = tiny.prompts()["content"]
    bare, expected = predictions(host(base, prompts)), predictions(host(adapted, prompts))
    found = predictions(ours(pack, base, adapted, 1.0, 1.0))
    for one, wanted, without in zip(found, expected, bare, strict=True):
        assert (wanted - without).norm() > 0.01 * without.norm()
        torch.testing.assert_close(one, wanted)
