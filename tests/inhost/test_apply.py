"""A zipped pair on a model against the host's own LoRA loader."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file


def weights(patcher) -> dict[str, torch.Tensor]:
    """The model's weights as the host loads them with everything that is on the patcher."""
    import comfy.model_management as management

    with torch.inference_mode():
        management.load_models_gpu([patcher])
        found = {k: v.clone() for k, v in patcher.model.diffusion_model.state_dict().items()}
        management.unload_all_models()
    return found


def stock(patcher, lora, strength: float = 1.0):
    import comfy.sd

    return comfy.sd.load_lora_for_models(patcher, None, lora, strength, 0)[0]


def zip_pair(pack, patcher, sources, coefficients=None):
    """A ZIPPED_LORA of a pair: all ones, which is what steps = 0 gives, or given coefficients."""
    loras, Coefficients = pack.nodes.bridge.lora.zipped, pack.ziplora_core.coefficients.Coefficients
    fitted = pack.nodes.bridge.lora.fitting.fit(sources, patcher.model)
    return loras.ZippedLoRA(sources, fitted, coefficients or Coefficients.ones(fitted.loras))


def random_coefficients(pack, pair):
    g = torch.Generator().manual_seed(0)
    ones = pack.ziplora_core.coefficients.Coefficients.ones(pair)
    return replace(
        ones,
        by_concept={
            c: {k: torch.randn(m.shape, generator=g) for k, m in of.items()} for c, of in ones.by_concept.items()
        },
    )


def largest_difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


@pytest.mark.smoke
def test_no_steps_equals_two_stock_loaders(pack):
    patcher = tiny.tiny_patcher()
    sources = tiny.sources(pack, patcher.model, strengths=(0.9, -0.4))
    settings = pack.ziplora_core.solver.Settings(steps=0)
    with torch.inference_mode():
        zipped, losses, *_ = pack.nodes.bridge.optimize.zipping.optimize(
            patcher, sources, tiny.prompts(), tiny.latents(), settings
        )
    assert losses == {"loss": []}
    ours, _ = pack.nodes.bridge.apply.apply(patcher, None, zipped, 1.0)
    theirs = stock(stock(patcher, sources["content"].tensors, 0.9), sources["style"].tensors, -0.4)
    bare = weights(patcher)
    assert largest_difference(weights(theirs), bare) > 0.01, "the LoRAs change nothing: this tests nothing"
    assert largest_difference(weights(ours), weights(theirs)) < 2e-6
    torch.testing.assert_close(tiny.sample(ours), tiny.sample(theirs), rtol=1e-3, atol=1e-3)
    assert largest_difference(weights(patcher), bare) == 0.0


def test_sampling_costs_what_it_costs_without(pack):
    """The pair is in the weights: not one operation more in a step, nothing injected, no option set."""
    from torch.utils.flop_counter import FlopCounterMode

    patcher = tiny.tiny_patcher()
    zipped = zip_pair(pack, patcher, tiny.sources(pack, patcher.model))
    ours, _ = pack.nodes.bridge.apply.apply(patcher, None, zipped, 1.0)
    assert ours.injections == {} == ours.object_patches and ours.model_options == patcher.model_options
    counts = []
    for model in (patcher, ours):
        tiny.sample(model)  # in which the host writes the weights
        with FlopCounterMode(display=False) as counter:
            tiny.sample(model)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.smoke
def test_coefficients_equal_a_written_file_in_the_stock_loader(pack, tmp_path):
    """Any LoRA loader in the world can apply a zipped pair: the identity, end to end, bit for bit."""
    patcher = tiny.tiny_patcher()
    sources = tiny.sources(pack, patcher.model, strengths=(0.7, 1.1))
    zipped = zip_pair(pack, patcher, sources)
    zipped = replace(zipped, coefficients=random_coefficients(pack, zipped.fitted.loras))
    file = {}
    for name, up, down in tiny.merged_layers(pack, zipped):
        key = "lora_unet_" + name.removeprefix("diffusion_model.").removesuffix(".weight").replace(".", "_")
        file[f"{key}.lora_up.weight"], file[f"{key}.lora_down.weight"] = up.clone(), down.clone()
    save_file(file, tmp_path / "zipped.safetensors")
    loaded = load_file(tmp_path / "zipped.safetensors")
    loaded = {key: t.clone() for key, t in loaded.items()}  # out of the map, whose alignment sums may depend on
    theirs = stock(patcher, loaded, 0.8)
    ours, _ = pack.nodes.bridge.apply.apply(patcher, None, zipped, 0.8)
    assert largest_difference(weights(ours), weights(theirs)) == 0.0
    assert torch.equal(tiny.sample(ours), tiny.sample(theirs))


def test_style_dial_leaves_the_content_lora_alone(pack):
    patcher = tiny.tiny_patcher()
    sources = tiny.sources(pack, patcher.model)
    zipped = zip_pair(pack, patcher, sources)
    execute = next(n for n in pack.nodes.NODES if n.__name__ == "StyleStrength").execute
    dialled = execute(zipped, style_strength=0.0, content_strength=1.0).args[0]
    ours, _ = pack.nodes.bridge.apply.apply(patcher, None, dialled, 1.0)
    assert largest_difference(weights(ours), weights(stock(patcher, sources["content"].tensors))) < 2e-6
    assert zipped.coefficients.overlap() == 1.0, "the dial changed what came in"


@pytest.mark.smoke
def test_other_loras_stay_and_strength_zero_is_nothing(pack):
    patcher = tiny.tiny_patcher()
    other = tiny.full_size.attention_lora(patcher.model, 4, 99, torch.float32)
    zipped = zip_pair(pack, patcher, tiny.sources(pack, patcher.model))
    apply = pack.nodes.bridge.apply.apply
    after, before = (
        apply(stock(patcher, other), None, zipped, 0.5)[0],
        stock(apply(patcher, None, zipped, 0.5)[0], other),
    )
    assert largest_difference(weights(after), weights(before)) < 2e-6
    assert apply(patcher, None, zipped, 0.0)[0] is patcher


def test_another_models_pair_is_refused(pack):
    import comfy.model_patcher

    zipped = zip_pair(pack, tiny.tiny_patcher(), tiny.sources(pack, tiny.tiny_patcher().model))
    with torch.inference_mode():
        shallow = tiny.full_size.sdxl_patcher(
            torch.float32, **{**tiny.CHANGES, "transformer_depth": [0, 0, 0, 0, 1, 1]}
        )
    assert isinstance(shallow, comfy.model_patcher.ModelPatcher)
    with pytest.raises(ValueError, match="zipped for another model.*diffusion_model"):
        pack.nodes.bridge.apply.apply(shallow, None, zipped, 1.0)


def test_full_size_sdxl_has_1571840_coefficients(pack):
    """Two rank-64 attention LoRAs on the host's own full-size class."""
    model = tiny.full_size.sdxl_model(torch.float16, device="meta")
    loras = pack.nodes.bridge.lora.loras
    lora = tiny.full_size.attention_lora(model, 64, 0)
    fitted = pack.nodes.bridge.lora.fitting.fit(
        loras.LoRASources(tiny.of_two(*(loras.LoRASource(n, lora, 1.0) for n in ("content", "style")))), model
    )
    assert fitted.loras.coefficient_count == 1_571_840
    assert fitted.loras.layer_counts()["both"] == 560
