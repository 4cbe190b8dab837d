"""Models that ComfyUI-GGUF loads: the numbers that their blocks stand for, with the LoRAs that lie on them."""

from __future__ import annotations

import gguf_like
import pytest
import tiny
import torch
from families import FAMILIES
from test_apply import largest_difference, zip_pair
from test_dense_formats import written
from test_formats import as_sources
from test_hosts import assert_equal_steps, one_step, rehearsed
from test_safety import left_behind


@pytest.fixture
def both():
    """(A patcher over a coded SDXL, the host's over the same numbers in floats)."""
    plain = tiny.tiny_patcher()
    with torch.inference_mode():
        return gguf_like.patcher_like(plain), plain


def used(patcher) -> dict[str, torch.Tensor]:
    """What its layers multiply with once the host has loaded it, with everything that is on the patcher."""
    import comfy.model_management as management

    with torch.inference_mode():
        management.load_models_gpu([patcher])
        found = {}
        for name, module in patcher.model.diffusion_model.named_modules():
            if isinstance(module, torch.nn.Linear):
                own = getattr(module, "get_weight", lambda weight, dtype: weight)
                found[name] = own(module.weight, torch.float32).clone()
        management.unload_all_models()
    return found


def test_the_stand_in_is_coded_and_computes_what_its_numbers_do(both):
    coded, plain = both
    kinds = [gguf_like.is_coded(m.weight) for m in coded.model.modules() if isinstance(m, torch.nn.Linear)]
    assert kinds.count(True) > 100
    torch.testing.assert_close(tiny.sample(coded), tiny.sample(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recomputed", [0, 99])
def test_the_gradient_is_of_these_numbers(pack, both, recomputed):
    coded, plain = both
    sources = tiny.sources(pack, plain.model)
    ours, theirs = (one_step(pack, model, sources, recomputed=recomputed) for model in (coded, plain))
    assert_equal_steps(ours, theirs, 1e-4)


def test_so_it_is_under_a_lora_of_the_users(pack, both):
    """Which that pack's patcher lays onto its tensors, to be added as they are written out."""
    import comfy.sd

    coded, plain = both
    file = tiny.full_size.attention_lora(plain.model, 4, 9, torch.float32)
    coded, plain = (comfy.sd.load_lora_for_models(model, None, file, 0.7, 0)[0] for model in both)
    sources = tiny.sources(pack, plain.model)
    ours, theirs = (one_step(pack, model, sources) for model in (coded, plain))
    assert_equal_steps(ours, theirs, 1e-4)
    assert abs(theirs[0] / one_step(pack, both[1], sources)[0] - 1) > 1e-3, "the LoRA changes nothing"


@pytest.mark.parametrize("name", ["Flux", "Qwen-Image"])
def test_so_it_is_for_other_families(pack, name):
    family = FAMILIES[name]
    plain = family.patcher()
    with torch.inference_mode():
        coded = gguf_like.patcher_like(plain)
    assert any(gguf_like.is_coded(p) for p in coded.model.parameters())
    sources = as_sources(pack, family.lora(plain.model, 4, 1), family.lora(plain.model, 2, 2))
    ours, theirs = (one_step(pack, m, sources, family.prompts(), family.latents()) for m in (coded, plain))
    assert_equal_steps(ours, theirs, 1e-3)


FILES = ("LoRA", "LoHa", "LoKr, whole", "OFT", "DoRA")


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_a_pair_adds_what_that_packs_own_loading_adds(pack, both, name, loaded):
    """Also where the model is loaded with another LoRA meanwhile, which lies on its tensors."""
    import comfy.model_management as management
    import comfy.sd

    coded, plain = both
    file = written(plain.model, "linear", name)
    other = {k: v * 0 for k, v in tiny.full_size.attention_lora(plain.model, 2, 1, torch.float32).items()}
    before, theirs = used(coded), used(comfy.sd.load_lora_for_models(coded, None, file, 1.0, 0)[0])
    assert largest_difference(theirs, before) > 0.01
    if loaded:
        lying = tiny.full_size.attention_lora(plain.model, 4, 9, torch.float32)
        with torch.inference_mode():
            management.load_models_gpu([comfy.sd.load_lora_for_models(coded, None, lying, 1.0, 0)[0]])
    zipped = zip_pair(pack, coded, as_sources(pack, file, other))
    ours = used(pack.nodes.bridge.apply.apply(coded, None, zipped, 1.0)[0])
    assert largest_difference(ours, theirs) < 1e-4


def test_slices_of_fused_layers_are_found(pack):
    """Flux's, in diffusers' names: the tensor holds bytes of another shape."""
    import comfy.sd

    plain = FAMILIES["Flux"].patcher()
    with torch.inference_mode():
        coded = gguf_like.patcher_like(plain)
    fused = {k: w for k, w in plain.model.state_dict().items() if k.endswith("img_attn.qkv.weight")}
    assert all(gguf_like.is_coded(coded.model.get_parameter(key)) for key in fused) and fused
    g, file = torch.Generator().manual_seed(0), {}
    for key, weight in fused.items():
        rows, columns = weight.shape[0] // 3, weight.shape[1]
        for part in ("to_q", "to_v"):
            name = f"transformer.transformer_blocks.{key.split('.')[2]}.attn.{part}"
            file[f"{name}.lora_A.weight"] = torch.randn(2, columns, generator=g)
            file[f"{name}.lora_B.weight"] = torch.randn(rows, 2, generator=g)
    other = {k: v * 0 for k, v in FAMILIES["Flux"].lora(plain.model, 2, 1).items()}
    theirs = used(comfy.sd.load_lora_for_models(coded, None, file, 1.0, 0)[0])
    assert largest_difference(theirs, used(coded)) > 0.1
    ours = used(
        pack.nodes.bridge.apply.apply(coded, None, zip_pair(pack, coded, as_sources(pack, file, other)), 1.0)[0]
    )
    assert largest_difference(ours, theirs) < 1e-4


def test_a_zip_is_that_of_these_numbers_and_changes_nothing(pack, both):
    coded, plain = both
    held = {name: p.data.as_subclass(torch.Tensor).clone() for name, p in coded.model.named_parameters()}
    before = tiny.sample(coded)
    sources, settings = tiny.sources(pack, plain.model), pack.ziplora_core.solver.Settings()
    with torch.inference_mode():
        zipped, expected = (
            pack.nodes.bridge.optimize.zipping.optimize(model, sources, tiny.prompts(), tiny.latents(), settings)[0]
            for model in (coded, plain)
        )
    assert expected.coefficients.overlap() < 1.0
    for concept, layers in expected.coefficients.by_concept.items():
        for key, numbers in layers.items():
            torch.testing.assert_close(zipped.coefficients.by_concept[concept][key], numbers, rtol=1e-3, atol=1e-3)
    assert left_behind(coded) == [] and coded.patches == {}
    assert torch.equal(tiny.sample(coded), before)
    for name, parameter in coded.model.named_parameters():
        assert torch.equal(parameter.data.as_subclass(torch.Tensor), held[name])
        assert not getattr(parameter, "patches", [])


def test_memory_is_planned_as_for_these_numbers(pack, both):
    coded, plain = both
    sources = tiny.sources(pack, plain.model)
    ours, theirs = rehearsed(pack, coded, sources), rehearsed(pack, plain, sources)
    assert ours.inputs == theirs.inputs and ours.inside == theirs.inside


def test_such_a_model_is_told_by_its_bytes(pack, both):
    """So its zips are remembered: of another load too, whatever lies on the tensors; not of other numbers."""
    import comfy.model_management as management
    import comfy.sd

    content, (coded, plain) = pack.nodes.bridge.disk.content, both
    first = content.digest(content.of_model(coded))
    with torch.inference_mode():
        again = gguf_like.patcher_like(tiny.tiny_patcher())
        lying = tiny.full_size.attention_lora(plain.model, 4, 9, torch.float32)
        management.load_models_gpu([comfy.sd.load_lora_for_models(again, None, lying, 1.0, 0)[0]])
        assert content.digest(content.of_model(again)) == first
        management.unload_all_models()
        other = gguf_like.patcher_like(tiny.tiny_patcher())
        layer = next(m for m in other.model.modules() if gguf_like.is_coded(getattr(m, "weight", None)))
        layer.weight.data.as_subclass(torch.Tensor)[0, 5] += 1
    assert content.digest(content.of_model(other)) != first
