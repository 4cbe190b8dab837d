"""Files of the trainers that SDXL users have, against the host's loader where it reads them."""

from __future__ import annotations

import pytest
import tiny
import torch
from test_apply import largest_difference, stock, weights, zip_pair


def diffusers_names(model) -> dict[str, str]:
    """Weight of the model -> its diffusers name, from the host's own table."""
    import comfy.utils

    table = comfy.utils.unet_to_diffusers(model.model_config.unet_config)
    return {f"diffusion_model.{v}": k for k, v in table.items()}


def kohya_ldm(key, _, up, down, alpha):
    name = "lora_unet_" + key.removeprefix("diffusion_model.").removesuffix(".weight").replace(".", "_")
    return {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": alpha}


def kohya_diffusers(_, name, up, down, alpha):
    name = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
    return {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": alpha}


def diffusers(_, name, up, down, alpha):
    name = "unet." + name.removesuffix(".weight")
    return {f"{name}.lora.up.weight": up, f"{name}.lora.down.weight": down, f"{name}.alpha": alpha}


def processor(_, name, up, down, alpha):
    name = "unet." + name.removesuffix(".weight").replace(".to_", ".processor.to_").replace("to_out.0", "to_out")
    return {f"{name}_lora.up.weight": up, f"{name}_lora.down.weight": down, f"{name}.alpha": alpha}


def peft(prefix, infix=""):
    def write(_, name, up, down, alpha):
        name = prefix + name.removesuffix(".weight")
        return {f"{name}.lora_B{infix}.weight": up, f"{name}.lora_A{infix}.weight": down, f"{name}.alpha": alpha}

    return write


FORMATS = {
    "kohya, ldm blocks": kohya_ldm,
    "kohya, diffusers blocks": kohya_diffusers,
    "diffusers": diffusers,
    "diffusers, processor": processor,
    "peft": peft(""),
    "peft unet.": peft("unet."),
    "peft unet.unet.": peft("unet.unet."),
    "peft base_model.model.": peft("base_model.model."),
    "peft unet.base_model.model.": peft("unet.base_model.model."),
    "peft with adapter name": peft("base_model.model.", ".default"),
}


def canonical(model, rank: int) -> dict[str, tuple]:
    """(up, down, alpha) per attention weight; alpha differs from the rank so that forgetting it shows."""
    g = torch.Generator().manual_seed(rank)
    return {
        key: (torch.randn(w.shape[0], rank, generator=g), torch.randn(rank, w.shape[1], generator=g), torch.tensor(3.0))
        for key, w in model.state_dict().items()
        if ".attn" in key and key.endswith(".weight")
    }


def written(model, layers, write) -> dict[str, torch.Tensor]:
    names, file = diffusers_names(model), {}
    for key, (up, down, alpha) in layers.items():
        file.update(write(key, names[key], up, down, alpha))
    return file


def as_sources(pack, content, style):
    loras = pack.nodes.bridge.lora.loras
    return loras.LoRASources(
        {c: loras.LoRASource(c, tensors, 1.0) for c, tensors in (("content", content), ("style", style))}
    )


@pytest.mark.smoke
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_reads_as_the_same_factors(pack, name):
    model = tiny.tiny_patcher().model
    layers = canonical(model, 5)
    file = written(model, layers, FORMATS[name])
    other = tiny.full_size.attention_lora(model, 2, 1, torch.float32)
    fitted = pack.nodes.bridge.lora.fitting.fit(as_sources(pack, file, other), model)
    assert fitted.notes == []
    assert fitted.loras.layers.keys() == layers.keys()
    for key, (up, down, alpha) in layers.items():
        factors = fitted.loras.layers[key]["content"]
        assert torch.equal(factors.up, up) and torch.equal(factors.down, down)
        assert factors.scale == pytest.approx(alpha.item() / 5)
        assert fitted.loras.layers[key]["style"].rank == 2


def test_no_alpha_means_scale_one(pack):
    model = tiny.tiny_patcher().model
    file = {k: v for k, v in written(model, canonical(model, 5), diffusers).items() if not k.endswith(".alpha")}
    fitted = pack.nodes.bridge.lora.fitting.fit(as_sources(pack, file, file), model)
    assert {f.scale for layer in fitted.loras.layers.values() for _, f in layer.items()} == {1.0}


def test_convolutions_with_and_without_tucker_core_equal_the_stock_loader(pack):
    """LoCon on a 3 x 3 and a 1 x 1 convolution, linear layers beside attention, a layer of one file only."""
    patcher = tiny.tiny_patcher()
    g = torch.Generator().manual_seed(0)
    state = patcher.model.state_dict()
    convs = [k for k, v in state.items() if v.ndim == 4 and k.endswith("weight")][:6]
    linears = [k for k, v in state.items() if v.ndim == 2 and ("proj_in" in k or "emb_layers" in k or "ff." in k)]
    files = ({}, {})
    for i, key in enumerate([*convs, *linears]):
        out, columns, *kernel = state[key].shape
        name = "lora_unet_" + key.removeprefix("diffusion_model.").removesuffix(".weight").replace(".", "_")
        for j, file in enumerate(files):
            if (i + j) % 4 == 3:
                continue
            tucker = len(kernel) == 2 and kernel[0] == 3 and (i + j) % 2
            down_kernel = [1, 1] if tucker else kernel
            file[f"{name}.lora_up.weight"] = torch.randn(out, 3, *([1] * len(kernel)), generator=g) * 0.1
            file[f"{name}.lora_down.weight"] = torch.randn(3, columns, *down_kernel, generator=g) * 0.1
            if tucker:
                file[f"{name}.lora_mid.weight"] = torch.randn(3, 3, *kernel, generator=g)
            file[f"{name}.alpha"] = torch.tensor(2.0)
    zipped = zip_pair(pack, patcher, as_sources(pack, *files))
    counts = zipped.fitted.loras.layer_counts()
    assert counts["both"] and counts["content only"] and counts["style only"]
    ours, _ = pack.nodes.bridge.apply.apply(patcher, None, zipped, 1.0)
    theirs = stock(stock(patcher, files[0]), files[1])
    assert largest_difference(weights(theirs), weights(patcher)) > 0.01
    assert largest_difference(weights(ours), weights(theirs)) < 2e-6
    settings = pack.ziplora_core.solver.Settings(steps=2, solver="layerwise, then gradient")
    with torch.inference_mode():
        zipped, losses, *_ = pack.nodes.bridge.optimize.zipping.optimize(
            patcher, zipped.sources, tiny.prompts(), tiny.latents(), settings
        )
    moved = [k for k, m in zipped.coefficients["content"].items() if not torch.equal(m, torch.ones_like(m))]
    assert any(k in moved for k in convs) and len(losses["loss"]) == 2


def test_bias_and_norm_differences_ride_along(pack):
    patcher = tiny.tiny_patcher()
    content = tiny.full_size.attention_lora(patcher.model, 2, 1, torch.float32)
    content["lora_unet_out_0.w_norm"] = torch.full((32,), 0.25)
    content["lora_unet_out_2.diff_b"] = torch.full((4,), 0.5)
    style = tiny.full_size.attention_lora(patcher.model, 2, 2, torch.float32)
    zipped = zip_pair(pack, patcher, as_sources(pack, content, style))
    ours, _ = pack.nodes.bridge.apply.apply(patcher, None, zipped, 0.5)
    theirs = stock(stock(patcher, content, 0.5), style, 0.5)
    assert weights(theirs)["out.2.bias"].abs().max() == 0.25
    assert largest_difference(weights(ours), weights(theirs)) < 2e-6


def test_unused_keys_are_counted_not_dropped_in_silence(pack):
    model = tiny.tiny_patcher().model
    content = tiny.full_size.attention_lora(model, 2, 1, torch.float32)
    content["lora_unet_no_such_layer.lora_up.weight"] = torch.ones(2, 1)
    content["lora_unet_no_such_layer.lora_down.weight"] = torch.ones(1, 2)
    content["lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha"] = torch.tensor(1.0)
    style = tiny.full_size.attention_lora(model, 2, 2, torch.float32)
    (note,) = pack.nodes.bridge.lora.fitting.fit(as_sources(pack, content, style), model).notes
    assert note.startswith("2 tensors of 'content'") and "no_such_layer" in note


def spoiled(model, spoil):
    lora = tiny.full_size.attention_lora(model, 2, 1, torch.float32)
    name = next(iter(lora)).split(".")[0]
    return spoil(lora, name)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda lora, n: {k.replace("lora_unet", "lora_unot"): v for k, v in lora.items()}, "no layer that fits"),
        (lambda lora, n: {**lora, f"{n}.lora_down.weight": torch.ones(2, 7)}, "made for another model"),
        (lambda lora, n: {**lora, f"{n}.lora_up.weight": torch.ones(7, 2)}, "made for another model"),
        (lambda lora, n: {**lora, f"{n}.lora_up.weight": torch.ones(64, 3)}, "is broken at layer.*do not multiply"),
        (lambda lora, n: {**lora, f"{n}.reshape_weight": torch.tensor([64, 96])}, "changes the shape of layer"),
        (
            lambda lora, n: {**lora, "lora_unet_out_2.diff": torch.ones(4, 31, 3, 3)},
            "made for another model.*differences",
        ),
        (lambda lora, n: {**lora, f"{n}.dora_scale": torch.ones(7, 3)}, "made for another model.*DoRA"),
    ],
)
def test_what_cannot_be_zipped_is_named(pack, spoil, says):
    model = tiny.tiny_patcher().model
    good = tiny.full_size.attention_lora(model, 2, 2, torch.float32)
    LoRAFileError = pack.ziplora_core.files.LoRAFileError
    with pytest.raises(LoRAFileError, match=says) as caught:
        pack.nodes.bridge.lora.fitting.fit(as_sources(pack, good, spoiled(model, spoil)), model)
    assert "'style'" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("kohya, ldm blocks", "peft unet."),
        ("peft", "kohya, diffusers blocks"),
        ("diffusers, processor", "kohya, ldm blocks"),
    ],
)
def test_a_layer_under_two_names_is_the_one_that_the_host_takes(pack, first, second):
    """Twice with other numbers, as a tool leaves them that adds one trainer's file to another's."""
    patcher = tiny.tiny_patcher()
    model, other = patcher.model, tiny.full_size.attention_lora(patcher.model, 2, 1, torch.float32)
    file = {
        **written(model, canonical(model, 5), FORMATS[first]),
        **written(model, canonical(model, 3), FORMATS[second]),
    }
    ours = zip_pair(pack, patcher, as_sources(pack, file, other))
    theirs = weights(stock(stock(patcher, file), other))
    applied = weights(pack.nodes.bridge.apply.apply(patcher, None, ours, 1.0)[0])
    assert largest_difference(applied, theirs) < 1e-4 * max(w.abs().max().item() for w in theirs.values())
    assert {layer["content"].rank for layer in ours.fitted.loras.layers.values()} <= {3, 5}
    (note,) = ours.fitted.notes
    assert f"'content' has {len(canonical(model, 3))} layers twice, under different names" in note


def test_a_layer_under_two_names_that_the_host_does_not_know_counts_once(pack):
    model = tiny.tiny_patcher().model
    layers = {name: canonical(model, rank) for name, rank in (("peft", 5), ("diffusers", 3))}
    file = {k: t for name, found in layers.items() for k, t in written(model, found, FORMATS[name]).items()}
    other = tiny.full_size.attention_lora(model, 2, 1, torch.float32)
    fitted = pack.nodes.bridge.lora.fitting.fit(as_sources(pack, file, other), model)
    assert {layer["content"].rank for layer in fitted.loras.layers.values()} <= {3, 5}
    assert len(fitted.notes) == 1 and "layers twice" in fitted.notes[0]
