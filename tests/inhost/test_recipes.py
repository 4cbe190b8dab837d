"""How models draw their references: what the host's sampler is told, and at which noise levels LoRAs are compared."""

from __future__ import annotations

import copy
import math
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import test_gradient
import tiny
import torch
from families import FAMILIES
from safetensors.torch import save_file

GUIDED = (20, 4.0, "euler", "normal")
LIGHTNING = "sdxl_lightning_4step_lora.safetensors"


@pytest.fixture(scope="module")
def patcher():
    return tiny.tiny_patcher()


@pytest.fixture
def told(monkeypatch):
    """(steps, cfg, sampler, scheduler) of each call of the host's sampler, which takes one step."""
    import comfy.sample

    real, seen = comfy.sample.sample, []

    def sample(model, noise, steps, cfg, sampler, scheduler, *rest, **given):
        seen.append((steps, cfg, sampler, scheduler))
        return real(model, noise, 1, cfg, sampler, scheduler, *rest, **given)

    monkeypatch.setattr(comfy.sample, "sample", sample)
    return seen


@pytest.fixture
def graph(monkeypatch):
    """`graph(*names)`: a server runs a graph that loads these checkpoints."""

    def runs(*names: str) -> None:
        prompt = {str(i): {"inputs": {"ckpt_name": name}} for i, name in enumerate(names)}
        queue = SimpleNamespace(currently_running={0: (0, "id", prompt, {}, [])})
        module = SimpleNamespace(PromptServer=SimpleNamespace(instance=SimpleNamespace(prompt_queue=queue)))
        monkeypatch.setitem(sys.modules, "server", module)

    return runs


@pytest.fixture
def loras(tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    folder_paths.filename_list_cache.clear()
    yield tmp_path
    folder_paths.filename_list_cache.clear()


def draw(pack, patcher, prompt=None, **given):
    sampling = pack.nodes.bridge.drawing.sampling
    with torch.inference_mode():
        prompt = tiny.prompts()["content"] if prompt is None else prompt
        return sampling.draw_plain(patcher, prompt, sampling.ReferenceRequest(1, 64), 0, **given)


def sampled_by(patcher, sampling: str, zsnr: bool):
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    return ModelSamplingDiscrete().patch(patcher, sampling, zsnr)[0]


def with_lora(patcher, path, seed: int = 5):
    """As the host's loader puts a file on."""
    import nodes
    from devhost import full_size

    if not path.exists():
        save_file(full_size.attention_lora(patcher.model, 4, seed, torch.float32), path)
    return nodes.LoraLoaderModelOnly().load_lora_model_only(patcher, path.name, 0.5)[0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("SD 1.5", GUIDED),
        ("SD 3", (20, 4.0, "euler", "simple")),
        ("Flux", (20, 1.0, "euler", "simple")),
        ("Lumina 2", (20, 4.0, "euler", "simple")),
    ],
)
def test_families_are_drawn_as_they_draw(pack, told, name, expected):
    family = FAMILIES[name]
    line = draw(pack, family.patcher(), family.prompts()["content"]).line("content")
    steps, cfg, sampler, scheduler = expected
    assert told == [expected] and line.endswith(f", {sampler}, {scheduler}, {steps} steps, cfg {cfg:g}")


def test_flux_schnell_is_known_by_its_layers(pack, graph):
    from comfy.ldm.flux.model import FluxParams

    flux, newer = FAMILIES["Flux"], "txt_ids_dims" in FluxParams.__dataclass_fields__
    unet = {**flux.unet, "guidance_embed": False, **({"txt_ids_dims": []} if newer else {})}
    family = replace(flux, config="FluxSchnell", unet=unet)
    patcher, seen = family.patcher(), []
    hook = patcher.model.diffusion_model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    line = draw(pack, patcher, family.prompts()["content"]).line("content")
    hook.remove()
    assert seen == [1] * 4, "one row a step: no pass for an empty prompt"
    assert line.endswith(", euler, simple, 4 steps, cfg 1")
    graph("flux-dev-de-distill.safetensors")
    assert pack.nodes.bridge.drawing.recipes.of(patcher).steps == 20


def test_guidance_in_the_prompt_is_said_where_the_model_takes_it(pack):
    for family, said in ((FAMILIES["Flux"], ", guidance 2.5 in the prompt"), (FAMILIES["SD 3"], "")):
        ((context, options),) = family.prompts()["content"]
        line = draw(pack, family.patcher(), [[context, {**options, "guidance": 2.5}]], most_steps=1).line("content")
        assert line.endswith(f"1 steps, cfg {1 if said else 4}{said}")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["sdxl_lightning_8step.safetensors"], (8, 1.0, "euler", "simple")),
        (["sub/DreamShaperXL_Turbo_v2.safetensors"], (4, 1.0, "euler", "simple")),
        (["sd_xl_base_1.0.safetensors"], GUIDED),
        (["sd_xl_base_1.0.safetensors", "sdxl_lightning_8step.safetensors"], GUIDED),
        (["sdxl_lightning_8step.safetensors"] * 2, (8, 1.0, "euler", "simple")),
    ],
)
def test_a_name_in_the_graph_tells_where_it_is_the_only_one(pack, patcher, told, graph, names, expected):
    graph(*names)
    draw(pack, patcher)
    assert told == [expected]


def test_what_the_host_keeps_with_a_model_tells_more_than_the_graph(pack, patcher, graph, tmp_path):
    """Its file's title too."""
    recipes, model = pack.nodes.bridge.drawing.recipes, patcher.clone()
    kept = hasattr(model, "cached_patcher_init")
    graph("sdxl_lightning_8step.safetensors")
    for name, title, steps in (("a", None, 20), ("b", "SDXL Turbo 2 steps", 2), ("c_lightning", None, 4)):
        path = tmp_path / f"{name}.safetensors"
        save_file({"x": torch.zeros(1)}, path, None if title is None else {"modelspec.title": title})
        model.cached_patcher_init = (print, (str(path), False), 0)
        assert recipes.of(model).steps == steps and (recipes.of(model.clone()).steps == steps or not kept)
    model.cached_patcher_init = (print, (str(tmp_path / "gone_lightning_2step.gguf"),))
    assert recipes.of(model).steps == 2 and recipes.of(model).told_by == "'gone_lightning_2step.gguf'"


def test_a_lora_below_tells_if_it_is_really_on(pack, patcher, told, loras):
    with torch.inference_mode():
        plain = with_lora(patcher, loras / "my_dog.safetensors")
        fast = with_lora(plain, loras / LIGHTNING, seed=6)
        other = with_lora(patcher, loras / "another.safetensors", seed=7)
    for model in (plain, fast, other):
        draw(pack, model)
    assert told == [GUIDED, (4, 1.0, "euler", "simple"), GUIDED]
    import folder_paths

    (loras / LIGHTNING).rename(loras / "renamed.safetensors")
    folder_paths.filename_list_cache.clear()
    assert draw(pack, fast).recipe.steps == 20


@pytest.mark.parametrize(
    ("sampling", "expected"), [("lcm", (8, 1.0, "lcm", "simple")), ("x0", (1, 1.0, "euler", "simple"))]
)
def test_sampling_that_was_put_on_tells(pack, patcher, told, sampling, expected):
    assert draw(pack, sampled_by(patcher, sampling, False)) is not None
    draw(pack, sampled_by(patcher, "img_to_img", False))
    assert told == [expected, GUIDED]


def levels_of(pack, model) -> tuple[set, int]:
    """(noise levels that the network hears, timesteps of the predictor) in a zip's own passes over its references."""
    core, heard, timesteps = pack.ziplora_core, set(), []
    pair = pack.nodes.bridge.lora.fitting.fit(tiny.sources(pack, model.model), model.model).loras

    def work(predict, joined, references):
        timesteps.append(predict.timesteps)
        apply = predict._model.apply_model
        predict._model.apply_model = lambda x, t, **given: heard.update(t.tolist()) or apply(x, t, **given)
        flat = joined.flatten(core.coefficients.Coefficients.ones(pair))
        try:
            for batches in core.draws.spread_batches(references, predict, 0, 8):
                for batch in batches:
                    assert bool(predict(batch, joined.student(flat)).isfinite().all())
            steps = core.draws.training_batches(references, predict, core.solver.Settings(batch_size=4))
            for batch in [batch for _ in range(6) for batch in next(steps)]:
                assert bool(predict(batch, joined.student(flat)).isfinite().all())
        finally:
            del predict._model.apply_model

    latents = {c: latent["samples"] for c, latent in tiny.latents().items()}
    with torch.inference_mode():
        pack.nodes.bridge.network.predictor.with_predictor(model, pair, tiny.prompts(), latents, work)
    return heard, *timesteps


def test_loras_are_compared_at_the_noise_levels_that_the_model_draws_at(pack, patcher, graph):
    """Against those at which the host's own sampler calls the network."""
    _, timesteps = levels_of(pack, patcher)
    assert timesteps == 1000
    graph("sdxl_lightning_4step.safetensors")
    heard, timesteps = levels_of(pack, patcher)
    drawn, apply = set(), patcher.model.apply_model
    patcher.model.apply_model = lambda x, t, **given: drawn.update(t.tolist()) or apply(x, t, **given)
    draw(pack, patcher)
    del patcher.model.apply_model
    assert timesteps == 4 == len(drawn) and sorted(heard) == pytest.approx(sorted(drawn))


@pytest.mark.parametrize("timestep", [0, 999])
def test_the_gradient_of_a_zero_snr_model_is_autograds(pack, patcher, timestep):
    """Over copied, densely merged weights; v by its own formula. The last noise level is 4518."""
    core, bridge = pack.ziplora_core, pack.nodes.bridge
    model = sampled_by(patcher, "v_prediction", True)
    fitted = bridge.lora.fitting.fit(tiny.sources(pack, model.model), model.model)
    paper = core.solver.Settings(similarity_lambda=test_gradient.LAMBDA, objective=core.objective.PAPER)
    found = {}

    def work(predict, joined, references):
        (batch,) = next(core.draws.training_batches(references, predict, core.solver.Settings(batch_size=1)))
        batch = replace(batch, timesteps=torch.full_like(batch.timesteps, timestep))
        flat = (torch.rand(fitted.loras.coefficient_count) + 0.5).requires_grad_()
        with torch.enable_grad():
            losses = core.gradient.accumulate_gradient(
                joined, predict, flat, [batch], paper, {"content": 1.0, "style": 1.0}, 1.0
            )
        copied = test_gradient.plain_copy(patcher, torch.float32)
        copied.model_sampling = copy.deepcopy(predict._model.model_sampling)
        copied.model_sampling.sigmas = sigmas = predict._sigmas.clone()
        assert not sigmas[999] < 4000
        other = flat.detach().clone().requires_grad_()
        conditioning = {c: predict._conds[c, c] for c in references}
        with torch.enable_grad():
            expected = test_gradient.dense_loss(
                pack, copied, fitted, joined.split(other), references, batch, conditioning, v_of
            )
            expected.backward()
        found.update(loss=(losses.total, expected.item()), gradient=(flat.grad, other.grad))

    latents = {c: latent["samples"] for c, latent in tiny.latents().items()}
    with torch.inference_mode():
        bridge.network.predictor.with_predictor(model, fitted.loras, tiny.prompts(), latents, work)
    got, expected = found["gradient"]
    assert found["loss"][0] == pytest.approx(found["loss"][1], rel=1e-4)
    assert expected.norm() > 0 and (got - expected).norm() < 1e-3 * expected.norm()


def v_of(x, x0, sigma):
    """x0 = x / (σ² + 1) − v σ / √(σ² + 1)"""
    return (x / (sigma**2 + 1) - x0) * (sigma**2 + 1).sqrt() / sigma


@pytest.mark.parametrize(
    ("sampling", "zsnr", "dtype"),
    [("v_prediction", True, torch.float32), ("v_prediction", True, torch.float16), ("eps", True, torch.float32),
     ("lcm", False, torch.float32), ("x0", False, torch.float32)],
)  # fmt: skip
def test_a_zip_is_finite_whatever_the_sampling(pack, monkeypatch, sampling, zsnr, dtype):
    """References, teachers and losses; retention is the better for it."""
    monkeypatch.setattr(pack.nodes.bridge.drawing.recipes, "STEPS", 9)
    core, model = pack.ziplora_core, sampled_by(tiny.tiny_patcher(dtype), sampling, zsnr)
    settings = core.solver.Settings(steps=2, solver="layerwise, then gradient")
    request = pack.nodes.bridge.drawing.sampling.ReferenceRequest(1, 64)
    drawn = {"content": None, "style": tiny.latents()["style"]}
    with torch.inference_mode():
        zipped, losses, report, _ = pack.nodes.bridge.optimize.zipping.optimize(
            model, tiny.sources(pack, model.model), tiny.prompts(), drawn, settings, request
        )
    recipe = pack.nodes.bridge.drawing.recipes.of(model)
    assert f", {recipe.line()}" in report and "content references: 1 drawn" in report
    assert ("zipped and measured at the noise levels of these" in report) == (recipe.steps < 9)
    assert len(losses["loss"]) == 2 and all(map(math.isfinite, [x for of in losses.values() for x in of]))
    assert all(m.isfinite().all() for of in zipped.coefficients.by_concept.values() for m in of.values())
    measured = re.findall(r"held-out noise: (\S+) direct merge, (\S+) zipped", report)
    assert len(measured) == 2 and sum(float(after) - float(before) for before, after in measured) < 0
