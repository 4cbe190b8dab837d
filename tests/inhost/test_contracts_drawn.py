"""References that a LoRA draws, against the host's own sampler and nodes; and what the report says of numbers."""

from __future__ import annotations

import math
import re

import oracle
import pytest
import tiny
import torch
from families import FAMILIES
from test_apply import stock


@pytest.fixture(scope="module")
def patcher():
    return tiny.tiny_patcher()


def sources_of(pack, patcher):
    """Two LoRAs at two strengths, each with a difference of a bias, which is on where its LoRA is."""
    sources = tiny.sources(pack, patcher.model, strengths=(0.8, 1.3))
    for source, value in ((sources["content"], 0.2), (sources["style"], -0.3)):
        source.tensors["lora_unet_out_2.diff_b"] = torch.full((4,), value)
    return sources


def host_draws(patcher, source, prompt, seed: int, count: int):
    import comfy.sample

    model = stock(patcher, source.tensors, source.strength)
    empty = torch.zeros(count, 4, 8, 8)
    with torch.inference_mode():
        noise = comfy.sample.prepare_noise(empty, seed)
        return comfy.sample.sample(
            model, noise, 20, 4.0, "euler", "normal", prompt, oracle.emptied(prompt), empty, seed=seed,
            disable_pbar=True,
        )  # fmt: skip


@pytest.mark.parametrize(("concept", "seed"), [("content", 5), ("style", 6)])
def test_references_are_the_hosts_pictures_of_one_lora_under_its_prompt(pack, patcher, concept, seed):
    """With the stock loader, Conditioning Zero Out, cfg 4 and a seed of its own for each concept."""
    drawing, fitting = pack.nodes.bridge.drawing, pack.nodes.bridge.lora.fitting
    sources, prompt = sources_of(pack, patcher), tiny.prompts()[concept]
    fitted = fitting.fit(sources, patcher.model)
    with torch.inference_mode():
        drawn = drawing.references.draw(
            patcher, sources, fitted, concept, prompt, drawing.sampling.ReferenceRequest(2, 64), 5
        )
    expected = host_draws(patcher, sources.by_concept[concept], prompt, seed, 2)
    assert (drawn.seed, drawn.recipe.cfg) == (seed, 4.0)
    torch.testing.assert_close(drawn.latents, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))
    assert not torch.equal(*drawn.latents)


def test_each_concept_is_drawn_from_its_own_prompt_and_nan_is_refused(pack, patcher, monkeypatch):
    import comfy.sample

    real, seen, broken = comfy.sample.sample, [], []

    def sample(model, noise, steps, cfg, sampler, scheduler, positive, negative, *rest, **given):
        seen.append(float(positive[0][0].double().sum()))
        drawn = real(model, noise, 1, cfg, sampler, scheduler, positive, negative, *rest, **given)
        return drawn * math.nan if broken else drawn

    monkeypatch.setattr(comfy.sample, "sample", sample)
    bridge, prompts = pack.nodes.bridge, tiny.prompts()
    arguments = (
        patcher,
        sources_of(pack, patcher),
        prompts,
        {"content": None, "style": None},
        pack.ziplora_core.solver.Settings(solver="layerwise"),
        bridge.drawing.sampling.ReferenceRequest(1, 64),
    )
    with torch.inference_mode():
        bridge.optimize.zipping.optimize(*arguments)
        assert seen[:2] == [float(prompts[c][0][0].double().sum()) for c in ("content", "style")]
        broken.append(True)
        with pytest.raises(FloatingPointError, match="content LoRA alone draws no picture"):
            bridge.optimize.zipping.optimize(*arguments)


@pytest.mark.parametrize(("name", "guidance", "rows"), [("Flux", 1.0, 1), ("SD 3", 4.0, 2)])
def test_a_model_that_was_distilled_is_not_guided_again(pack, name, guidance, rows):
    family = FAMILIES[name]
    patcher, seen = family.patcher(), set()
    hook = patcher.model.diffusion_model.register_forward_pre_hook(lambda _, args: seen.add(len(args[0])))
    with torch.inference_mode():
        asked = pack.nodes.bridge.drawing.sampling.ReferenceRequest(1, 64)
        drawn = pack.nodes.bridge.drawing.sampling.draw_plain(patcher, family.prompts()["content"], asked, 0)
    hook.remove()
    assert drawn.recipe.cfg == guidance and seen == {rows}


def test_thumbnails_are_in_the_hosts_colours(pack, patcher):
    """Of latents as a VAE gives them: the host's factors are for the model's own space."""
    form = patcher.model.latent_format
    given = torch.randn(3, 4, 1, 1, generator=torch.Generator().manual_seed(0)).expand(3, 4, 8, 8) * 4
    shown = pack.nodes.bridge.drawing.sampling.thumbnails(patcher, given)
    factors, bias = torch.tensor(form.latent_rgb_factors), torch.tensor(form.latent_rgb_factors_bias)
    colours = (form.process_in(given)[:, :, 0, 0] @ factors + bias + 1) / 2
    torch.testing.assert_close(shown.mean(dim=(1, 2)), colours.clamp(0, 1), rtol=0, atol=0.02)


def retentions(report: str) -> dict[str, tuple[float, float, int]]:
    """Of each concept: before, after, and the percent that it is said to be."""
    line = r"(\w+) retention loss on held-out noise: (\S+) direct merge, (\S+) zipped \((\d+)%\)"
    return {c: (float(b), float(a), int(p)) for c, b, a, p in re.findall(line, report)}


@pytest.mark.parametrize(("solver", "rate", "helps"), [("layerwise", 0.01, True), ("gradient", 5.0, False)])
def test_the_report_and_the_loss_map_say_what_was_measured(pack, patcher, solver, rate, helps):
    settings = pack.ziplora_core.solver.Settings(steps=2, solver=solver, learning_rate=rate, similarity_lambda=0.5)
    with torch.inference_mode():
        zipped, losses, report, _ = pack.nodes.bridge.optimize.zipping.optimize(
            patcher, tiny.sources(pack, patcher.model), tiny.prompts(), tiny.latents(), settings
        )
    found = retentions(report)
    assert set(found) == {"content", "style"}
    for before, after, percent in found.values():
        assert percent == pytest.approx(100 * after / before, abs=1.0)
    assert (sum(after for _, after, _ in found.values()) < sum(before for before, *_ in found.values())) == helps
    assert ("did not help" in report) != helps
    if solver == "gradient":
        assert losses["overlap"][0] == pytest.approx(0.5 * 100, rel=1e-3), "balanced counts percent; all ones overlap"
        for total, *terms in zip(*(losses[k] for k in ("loss", "content", "style", "overlap")), strict=True):
            assert total == pytest.approx(sum(terms))
