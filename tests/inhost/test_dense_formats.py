"""Updates that are not of low rank: the host's own calculation is the truth."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_apply import largest_difference, stock, weights
from test_formats import as_sources

RANK = 3


def _random(g, *shape):
    return torch.randn(*shape, generator=g) * 0.3


def lora(g, n, out, columns, *kernel):
    return {
        f"{n}.lora_up.weight": _random(g, out, RANK, *[1] * len(kernel)),
        f"{n}.lora_down.weight": _random(g, RANK, columns, *kernel),
        f"{n}.alpha": torch.tensor(2.0),
    }


def loha(g, n, out, columns, *kernel):
    flat = columns * math.prod(kernel)
    file = {f"{n}.hada_w{i}_a": _random(g, out, RANK) for i in (1, 2)}
    return {**file, **{f"{n}.hada_w{i}_b": _random(g, RANK, flat) for i in (1, 2)}, f"{n}.alpha": torch.tensor(2.0)}


def loha_tucker(g, n, out, columns, *kernel):
    file = {}
    for i in (1, 2):
        file[f"{n}.hada_w{i}_a"] = _random(g, RANK, out)
        file[f"{n}.hada_w{i}_b"] = _random(g, RANK, columns)
        file[f"{n}.hada_t{i}"] = _random(g, RANK, RANK, *kernel)
    return file


def lokr(g, n, out, columns, *kernel):
    return {
        f"{n}.lokr_w1": _random(g, 4, 4),
        f"{n}.lokr_w2_a": _random(g, out // 4, RANK),
        f"{n}.lokr_w2_b": _random(g, RANK, columns // 4 * math.prod(kernel)),
        f"{n}.alpha": torch.tensor(2.0),
    }


def lokr_whole(g, n, out, columns, *kernel):
    return {f"{n}.lokr_w1": _random(g, 4, 4), f"{n}.lokr_w2": _random(g, out // 4, columns // 4, *kernel)}


def glora(g, n, out, columns):
    return {
        f"{n}.a1.weight": _random(g, columns, RANK),
        f"{n}.a2.weight": _random(g, RANK, columns),
        f"{n}.b1.weight": _random(g, out, RANK),
        f"{n}.b2.weight": _random(g, RANK, columns),
    }


def oft(g, n, out, columns, *kernel):
    return {f"{n}.oft_blocks": _random(g, 4, out // 4, out // 4), f"{n}.alpha": torch.tensor(0.5)}


def boft(g, n, out, columns, *kernel):
    return {f"{n}.oft_blocks": _random(g, 2, 4, out // 4, out // 4), f"{n}.alpha": torch.tensor(0.5)}


def difference(g, n, out, columns, *kernel):
    return {f"{n}.diff": _random(g, out, columns, *kernel)}


def dora(write):
    """DoRA's scale on top of another format; its direction is the input axis, as most trainers have it."""

    def with_scale(g, n, out, columns, *kernel):
        scale = 1 + _random(g, 1, columns, *[1] * len(kernel)).abs()
        return {**write(g, n, out, columns, *kernel), f"{n}.dora_scale": scale}

    return with_scale


LINEAR = {
    "LoRA": lora,
    "DoRA": dora(lora),
    "LoHa": loha,
    "LoHa with DoRA": dora(loha),
    "LoKr": lokr,
    "LoKr, whole": lokr_whole,
    "LoKr with DoRA": dora(lokr),
    "GLoRA": glora,
    "OFT": oft,
    "BOFT": boft,
    "weight differences": difference,
}
CONVOLUTION = {
    "LoCon": lora,
    "DoRA": dora(lora),
    "LoHa": loha,
    "LoHa, Tucker": loha_tucker,
    "LoKr, whole": lokr_whole,
    "OFT": oft,
    "weight differences": difference,
}
CASES = [*(("linear", k) for k in LINEAR), *(("convolution", k) for k in CONVOLUTION)]


def written(model, kind: str, name: str) -> dict[str, torch.Tensor]:
    """A file in one format on every attention output, or on some 3 x 3 convolutions."""
    g = torch.Generator().manual_seed(7)
    ends = "to_out.0.weight" if kind == "linear" else "in_layers.2.weight"
    file = {}
    for key, weight in model.state_dict().items():
        if key.endswith(ends):
            n = "lora_unet_" + key.removeprefix("diffusion_model.").removesuffix(".weight").replace(".", "_")
            file |= {"linear": LINEAR, "convolution": CONVOLUTION}[kind][name](g, n, *weight.shape)
    return file


@pytest.mark.parametrize(("kind", "name"), CASES)
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_update_and_export_are_the_stock_loaders(pack, tmp_path, monkeypatch, kind, name, strength):
    """(a) ΔW is what the stock loader changes, (b) no key is dropped, (c) so does the exported file."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    patcher, lora = tiny.tiny_patcher(), pack.nodes.bridge.lora
    file = written(patcher.model, kind, name)
    other = {k: v * 0 for k, v in tiny.full_size.attention_lora(patcher.model, 2, 1, torch.float32).items()}
    sources = lora.loras.LoRASources(
        tiny.of_two(lora.loras.LoRASource("mine", file, strength), lora.loras.LoRASource("other", other, 1.0))
    )
    fitted = pack.nodes.bridge.lora.fitting.fit(sources, patcher.model)
    dense = [note for note in fitted.notes if "not of low rank" in note]
    assert len(fitted.notes) == len(dense) == (name not in ("LoRA", "LoCon"))
    assert all(word in note for note in dense for word in ("DoRA" if "DoRA" in name else name.split(",")[0], " MB"))
    bare, theirs = weights(patcher), weights(stock(patcher, file, strength))
    assert largest_difference(theirs, bare) > 0.01, "the file changes nothing: this tests nothing"
    for key, layer in fitted.loras.layers.items():
        if "content" in layer:
            f, key = layer["content"], key.removeprefix("diffusion_model.")
            delta = (f.scale * f.up @ f.down.flatten(1)).reshape(bare[key].shape)
            torch.testing.assert_close(delta, theirs[key] - bare[key], rtol=1e-4, atol=1e-5)
    ones = pack.ziplora_core.coefficients.Coefficients.ones(fitted.loras)
    zipped = lora.zipped.ZippedLoRA(sources, fitted, ones)
    ours = weights(pack.nodes.bridge.apply.apply(patcher, None, zipped, 1.0)[0])
    assert largest_difference(ours, theirs) < 1e-4
    _, report, _ = pack.nodes.bridge.export.export_file(zipped, "mine", 0, "fp32", "kohya")
    exported = load_file(tmp_path / report.splitlines()[0].split("written: ")[1].strip())
    assert largest_difference(weights(stock(patcher, exported)), ours) < 1e-4


@pytest.mark.parametrize("name", ["DoRA", "LoKr"])
def test_a_pair_of_them_is_zipped(pack, name):
    patcher = tiny.tiny_patcher()
    file = written(patcher.model, "linear", name)
    other = tiny.full_size.attention_lora(patcher.model, 2, 1, torch.float32)
    sources = as_sources(pack, file, other)
    settings = pack.ziplora_core.solver.Settings(steps=2, solver="layerwise, then gradient")
    with torch.inference_mode():
        zipped, _, report, _ = pack.nodes.bridge.optimize.zipping.optimize(
            patcher, sources, tiny.prompts(), tiny.latents(), settings
        )
    assert f"of 'content' are {name}" in report and "steps: 2 of 2" in report
    assert any(not torch.equal(m, torch.ones_like(m)) for m in zipped.coefficients["content"].values())


def test_base_weights_are_read_without_what_the_host_has_patched_in(pack):
    """DoRA's update depends on the weight: a model that was sampled with a LoRA has it written into its weights."""
    import comfy.model_management as management

    patcher = tiny.tiny_patcher()
    file = written(patcher.model, "linear", "DoRA")
    other = tiny.full_size.attention_lora(patcher.model, 2, 1, torch.float32)
    clean = pack.nodes.bridge.lora.fitting.fit(as_sources(pack, file, other), patcher.model)
    with torch.inference_mode():
        management.load_models_gpu([stock(patcher, other, 3.0)])
        patched = pack.nodes.bridge.lora.fitting.fit(as_sources(pack, file, other), patcher.model)
    for key, layer in clean.loras.layers.items():
        if "content" in layer:
            assert torch.equal(layer["content"].down, patched.loras.layers[key]["content"].down)
