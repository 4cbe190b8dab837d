"""Every family through the code that the nodes run: the stock loader's update, the true gradient, untouched."""

from __future__ import annotations

import contextlib
import importlib
from dataclasses import replace
from itertools import permutations

import pytest
import tiny
import torch
from families import FAMILIES, FIRST
from family import Family, own_names
from safetensors.torch import load_file
from test_apply import largest_difference, random_coefficients, stock, weights
from test_dense_formats import LINEAR
from test_formats import as_sources


@pytest.fixture(params=FAMILIES)
def family(request, monkeypatch) -> Family:
    FAMILIES[request.param].shrink(monkeypatch)
    return FAMILIES[request.param]


def pair_of(pack, family, model):
    return as_sources(pack, family.lora(model, 4, 1), family.lora(model, 2, 2))


def test_update_is_the_stock_loaders_and_export_is_too(pack, family, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    patcher, loras = family.patcher(), pack.nodes.bridge.lora.zipped
    sources = pair_of(pack, family, patcher.model)
    fitted = pack.nodes.bridge.lora.fitting.fit(sources, patcher.model)
    assert fitted.notes == [] and len(fitted.loras.layers) == len(family.weights(patcher.model))
    zipped = loras.ZippedLoRA(sources, fitted, pack.ziplora_core.coefficients.Coefficients.ones(fitted.loras))
    ours = weights(pack.nodes.bridge.apply.apply(patcher, None, zipped, 0.8)[0])
    theirs = stock(stock(patcher, sources["content"].tensors, 0.8), sources["style"].tensors, 0.8)
    assert largest_difference(weights(patcher), ours) > 0.01
    assert largest_difference(weights(theirs), ours) < 1e-5
    wild = replace(zipped, coefficients=random_coefficients(pack, fitted.loras))
    _, report, _ = pack.nodes.bridge.export.export_file(wild, "mine", 0, "fp32", "kohya")
    exported = load_file(tmp_path / report.splitlines()[0].split("written: ")[1].strip())
    ours = weights(pack.nodes.bridge.apply.apply(patcher, None, wild, 1.0)[0])
    assert largest_difference(weights(stock(patcher, exported)), ours) < 1e-5


def test_names_of_its_trainers_are_read_as_the_stock_loader_reads_them(pack, family):
    patcher = family.patcher()
    file, silent = family.lora(patcher.model, 3, 4, own_names), family.lora(patcher.model, 2, 2)
    silent = {k: v * 0 for k, v in silent.items()}
    sources = as_sources(pack, file, silent)
    fitted = pack.nodes.bridge.lora.fitting.fit(sources, patcher.model)
    assert fitted.notes == [] and not fitted.own
    ones = pack.ziplora_core.coefficients.Coefficients.ones(fitted.loras)
    zipped = pack.nodes.bridge.lora.zipped.ZippedLoRA(sources, fitted, ones)
    ours = weights(pack.nodes.bridge.apply.apply(patcher, None, zipped, 1.0)[0])
    changed = {k for k, w in weights(patcher).items() if not torch.equal(w, ours[k])}
    assert changed == {k.removeprefix("diffusion_model.") for k in family.weights(patcher.model)}
    assert largest_difference(weights(stock(patcher, file)), ours) < 1e-5


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in FIRST for kind in LINEAR])
def test_every_format_on_every_kind_of_network(pack, name, tmp_path, monkeypatch, kind):
    """(a) ΔW is what the stock loader changes, (b) nothing is dropped, (c) nor is it by the exported file."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    family = FAMILIES[name]
    patcher, loras = family.patcher(), pack.nodes.bridge.lora.zipped
    g, file = torch.Generator().manual_seed(9), {}
    for key, weight in list(family.weights(patcher.model).items())[::3]:
        layer = "lora_unet_" + key.removeprefix("diffusion_model.").removesuffix(".weight").replace(".", "_")
        file |= LINEAR[kind](g, layer, *weight.shape)
    silent = {k: v * 0 for k, v in family.lora(patcher.model, 2, 2).items()}
    sources = as_sources(pack, file, silent)
    sources = replace(sources, by_concept={**sources.by_concept, "content": replace(sources["content"], strength=0.8)})
    fitted = pack.nodes.bridge.lora.fitting.fit(sources, patcher.model)
    assert all("not of low rank" in note for note in fitted.notes)
    zipped = loras.ZippedLoRA(sources, fitted, pack.ziplora_core.coefficients.Coefficients.ones(fitted.loras))
    theirs = weights(stock(patcher, file, 0.8))
    assert largest_difference(weights(patcher), theirs) > 0.01
    ours = weights(pack.nodes.bridge.apply.apply(patcher, None, zipped, 1.0)[0])
    assert largest_difference(theirs, ours) < 1e-4
    _, report, _ = pack.nodes.bridge.export.export_file(zipped, "mine", 0, "fp32", "kohya")
    exported = load_file(tmp_path / report.splitlines()[0].split("written: ")[1].strip())
    assert largest_difference(weights(stock(patcher, exported)), ours) < 1e-4


def test_memory_is_estimated_as_it_is(pack, family):
    """Where blocks are run again, torch keeps some of their inputs where only the estimate sees them."""
    patcher, bridge = family.patcher(), pack.nodes.bridge
    pair = bridge.lora.fitting.fit(pair_of(pack, family, patcher.model), patcher.model).loras
    latents = {c: v["samples"] for c, v in family.latents().items()}
    rehearsed = bridge.memory.rehearsal.rehearse(patcher, pair, family.prompts(), latents)
    assert len(rehearsed.inside) == len(bridge.network.injection.blocks(patcher.model)) > 0
    again = rehearsed.outside + sum(rehearsed.inputs)
    kept, kept_again = (
        tiny.kept_for_backward(pack, patcher, pair, family.prompts(), latents, recomputed) for recomputed in (0, 99)
    )
    assert 2 * (again + sum(rehearsed.inside)) == pytest.approx(kept, rel=0.15)
    assert 0.85 * kept_again <= 2 * again < kept


def test_optimising_lowers_the_losses_and_leaves_the_model(pack, family):
    patcher = family.patcher()
    before = family.sample(patcher)
    settings = pack.ziplora_core.solver.Settings(steps=5, learning_rate=0.03, solver="layerwise, then gradient")
    with torch.inference_mode():
        _, losses, report, _ = pack.nodes.bridge.optimize.zipping.optimize(
            patcher, pair_of(pack, family, patcher.model), family.prompts(), family.latents(), settings
        )
    shares = [int(line.split("(")[1].split("%")[0]) for line in report.splitlines() if "retention loss" in line]
    assert len(shares) == 2 and max(shares) < 95, report
    assert len(losses["loss"]) == 5
    assert torch.equal(family.sample(patcher), before)


ALIKE = [  # in names or in shapes, of those beside the first
    ("Flux", "Flux 2"),
    ("Flux 2", "Flux"),
    ("Flux 2", "Chroma"),
    ("Flux", "HiDream"),
    ("HiDream", "Flux"),
    ("Wan", "Anima"),
    ("Anima", "Wan"),
    ("Wan", "Cosmos Predict2"),
    ("Wan", "Krea 2"),
    ("Krea 2", "Wan"),
    ("Krea 2", "HunyuanDiT"),
    ("Wan", "HunyuanVideo"),
    ("SD 3", "LTX-Video"),
    ("LTX-Video", "Qwen-Image"),
    ("Lumina 2", "Z-Image"),
]


@pytest.mark.parametrize(
    ("mine", "other"), [pair for pair in [*permutations(FIRST, 2), *ALIKE] if FAMILIES.keys() >= set(pair)]
)
def test_a_lora_of_another_family_is_told_by_its_own(pack, monkeypatch, mine, other):
    """Its names say which family it is for; SD 1.5's and SDXL's differ by the width of the prompts alone."""
    for name in (mine, other):
        FAMILIES[name].shrink(monkeypatch)
    stranger = FAMILIES[other]
    patcher = FAMILIES[mine].patcher()
    file = stranger.lora(stranger.model(), 2, 3)
    if other == "SD 1.5":
        file = {k: torch.zeros(2, 768) if "attn2_to_k.lora_down" in k else v for k, v in file.items()}
    with pytest.raises(
        ValueError, match=f"(no layer that fits|made for another model).*looks like a LoRA for .*{other}"
    ):
        pack.nodes.bridge.lora.fitting.fit(as_sources(pack, file, file), patcher.model)


def diffusers_flux(model) -> dict[str, torch.Tensor]:
    """diffusers' form of a Flux LoRA: q, k, v and the MLP of a fused layer are layers of their own, of rank 3."""
    import comfy.utils

    g, file, seen = torch.Generator().manual_seed(5), {}, set()
    for name, target in comfy.utils.flux_to_diffusers(model.model_config.unet_config, "diffusion_model.").items():
        key, part = (target, None) if isinstance(target, str) else (target[0], target[1])
        weight = FAMILIES["Flux"].weights(model).get(key)
        again = part is None and key in seen  # newer hosts know several names of a weight
        seen.add(key)
        if weight is not None and not again:
            out = weight.shape[0] if part is None else part[2]
            file[f"transformer.{name.removesuffix('.weight')}.lora_A.weight"] = torch.randn(
                3, weight.shape[1], generator=g
            )
            file[f"transformer.{name.removesuffix('.weight')}.lora_B.weight"] = torch.randn(out, 3, generator=g) * 0.1
    return file


def test_split_layers_on_one_side_and_fused_ones_on_the_other(pack):
    """Flux: a diffusers file with q, k and v apart, and a kohya file with them in one."""
    family = FAMILIES["Flux"]
    patcher, loras = family.patcher(), pack.nodes.bridge.lora.zipped
    fused = family.lora(patcher.model, 2, 2)
    split = diffusers_flux(patcher.model)
    sources = as_sources(pack, split, fused)
    fitted = pack.nodes.bridge.lora.fitting.fit(sources, patcher.model)
    assert fitted.notes == [] and fitted.loras.layer_counts()["both"] == len(family.weights(patcher.model))
    ranks = {layer["content"].rank for layer in fitted.loras.layers.values()}
    assert ranks == {3, 9, 12}, "one layer, q + k + v, and these with the MLP"
    zipped = loras.ZippedLoRA(sources, fitted, pack.ziplora_core.coefficients.Coefficients.ones(fitted.loras))
    ours = weights(pack.nodes.bridge.apply.apply(patcher, None, zipped, 0.8)[0])
    theirs = weights(stock(stock(patcher, split, 0.8), fused, 0.8))
    assert largest_difference(weights(patcher), theirs) > 0.01
    assert largest_difference(ours, theirs) < 1e-5


def test_references_are_drawn_in_its_own_latents(pack, family, monkeypatch):
    patcher, side = family.patcher(), family.latent[-1]
    monkeypatch.setattr(pack.nodes.bridge.drawing.sampling, "STEPS", 4, raising=False)
    bridge, settings = pack.nodes.bridge, pack.ziplora_core.solver.Settings(solver="layerwise")
    with torch.inference_mode():
        _, _, report, drawn = bridge.optimize.zipping.optimize(
            patcher,
            pair_of(pack, family, patcher.model),
            family.prompts(),
            {"content": None, "style": None},
            settings,
            bridge.drawing.sampling.ReferenceRequest(2, side * family.pixels),
        )
    assert f"style references: 2 drawn with its LoRA alone, latents of {side} x {side}, seed 1" in report
    assert drawn is not None and drawn.shape[0] == 4 and drawn.shape[-1] == 3


@contextlib.contextmanager
def plain_kernels():
    """Fused rotary positions of newer hosts as their package writes them out in torch."""
    import comfy

    kernels = getattr(getattr(comfy, "quant_ops", None), "ck", None)
    if kernels is None:
        yield
        return
    comfy.quant_ops.ck = importlib.import_module("comfy_kitchen.backends.eager.rope")
    try:
        yield
    finally:
        comfy.quant_ops.ck = kernels


@pytest.mark.parametrize("form", ["StableAudio1", "Hunyuan3Dv2", "ACEAudio", "LTXAV"])
def test_a_model_of_no_pictures_is_refused_by_name(pack, form):
    import comfy.latent_formats

    if not hasattr(comfy.latent_formats, form):
        pytest.skip("this host has no such model")
    family = FAMILIES["Flux"]
    patcher = family.patcher()
    sources = pair_of(pack, family, patcher.model)
    patcher.add_object_patch("latent_format", getattr(comfy.latent_formats, form)())
    with pytest.raises(ValueError, match=r"this model \(Flux\) makes sound or shapes.*connect one that draws"):
        pack.nodes.bridge.optimize.zipping.check_inputs(patcher, sources, {"content": None, "style": None})


def test_a_gate_of_experts_is_refused_where_it_is_found(pack):
    family = FAMILIES["HiDream"]
    patcher = family.patcher()
    key = "diffusion_model.single_stream_blocks.0.block.ff_i.gate.weight"
    file = {f"{part}.weight": torch.ones(shape) for part, shape in zip(own_names(key), ((4, 2), (2, 64)), strict=True)}
    fitted = pack.nodes.bridge.lora.fitting.fit(as_sources(pack, file, file), patcher.model).loras
    latents = {c: v["samples"] for c, v in family.latents().items()}
    with pytest.raises(ValueError, match="1 layers of the pair are of a kind that cannot be zipped.*gate"):
        pack.nodes.bridge.network.predictor.with_predictor(
            patcher, fitted, family.prompts(), latents, lambda *_: pytest.fail("it ran")
        )


class Apply(torch.nn.Module):
    """The host's model as a module of a few tensors, for functional_call."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, sigma, conditioning, options):
        return self.model.apply_model(x, sigma, **conditioning, transformer_options=options)


def dense_retention(family, patcher, fitted, m, batch, conditioning, options):
    """Both retentions of Eq. 3 by ordinary autograd over copied weights with dense updates, one row at a time."""
    with torch.inference_mode(False):
        copied = family.model()
        copied.load_state_dict({k: v.clone() for k, v in patcher.model.state_dict().items()}, strict=False)
        copied.requires_grad_(False)
        sampling = copied.model_sampling
        sampling.sigmas = sampling.sigmas.clone()
        sigma = sampling.sigmas[batch.timesteps]
        x = sampling.noise_scaling(sigma, batch.noise, batch.latents, False)
    own, merged = {"content": {}, "style": {}}, {}
    for name, layer in fitted.loras.layers.items():
        for concept, f in layer.items():
            own[concept][name] = f.scale * f.up.clone() @ f.down.clone()
            merged[name] = merged.get(name, 0) + own[concept][name] * m[concept][name]

    def raw(row, updates):
        """But for a term that teacher and student have in common."""
        names = {f"model.{k}": copied.get_parameter(k) + u for k, u in updates.items()}
        concept = ("content", "style")[batch.concept_index[row]]
        conds = {k: v.process_cond(batch_size=1, area=None).cond for k, v in conditioning[concept].items()}
        conds = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in conds.items()}
        one = slice(row, row + 1)
        x0 = torch.func.functional_call(Apply(copied), names, (x[one].clone(), sigma[one], conds, dict(options)))
        return -x0 / family.slope(sigma[one]).reshape(-1, *[1] * (x.ndim - 1))

    losses = []
    for row, place in enumerate(batch.concept_index.tolist()):
        with torch.no_grad():
            teacher = raw(row, own[("content", "style")[place]])
        losses.append((raw(row, merged) - teacher).flatten().norm())
    return torch.stack(losses).sum()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradient_is_that_of_autograd_over_copied_weights(pack, family, checkpointed):
    bridge, core = pack.nodes.bridge, pack.ziplora_core
    patcher = family.patcher()
    fitted = bridge.lora.fitting.fit(pair_of(pack, family, patcher.model), patcher.model)
    settings = core.solver.Settings(similarity_lambda=0.0, objective=core.objective.PAPER)
    found = {}

    def work(predict, joined, references):
        torch.manual_seed(0)
        flat = (torch.rand(fitted.loras.coefficient_count) + 0.5).requires_grad_()
        batches = next(core.draws.training_batches(references, predict, settings))
        with torch.enable_grad():
            plain = {"content": 1.0, "style": 1.0}
            losses = core.gradient.accumulate_gradient(joined, predict, flat, batches, settings, plain, 1.0)
            options = {"optimized_attention_override": bridge.network.session.attention_with_gradient}
            conditioning = {c: predict._conds[c, c] for c in ("content", "style")}

            def expected() -> tuple[float, torch.Tensor]:
                other = flat.detach().clone().requires_grad_()
                with plain_kernels(), torch.autograd.graph.allow_mutation_on_saved_tensors():  # some hosts add in place
                    reference = sum(
                        dense_retention(family, patcher, fitted, joined.split(other), b, conditioning, options)
                        for b in batches
                    )
                    reference.backward()
                return reference.item(), other.grad

            # Rarely, torch takes one saved tensor for another that has its address: what differs is no witness.
            reference, again = expected(), expected()
            for _ in range(3):
                if (reference[1] - again[1]).norm() <= 1e-5 * again[1].norm():
                    break
                reference, again = again, expected()
        found.update(loss=(losses.total, again[0]), gradient=(flat.grad, again[1]))

    with torch.inference_mode():
        samples = {c: v["samples"] for c, v in family.latents().items()}
        bridge.network.predictor.with_predictor(
            patcher, fitted.loras, family.prompts(), samples, work, recomputed=99 * checkpointed
        )
    assert found["loss"][0] == pytest.approx(found["loss"][1], rel=1e-4)
    got, expected = found["gradient"]
    difference = (got - expected).norm() / expected.norm()
    assert expected.norm() > 0 and difference < 1e-3, f"relative difference {difference:.2e}"
