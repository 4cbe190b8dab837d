"""Zipping without pictures: each LoRA draws its own references."""

from __future__ import annotations

import pytest
import tiny
import torch
from test_training import patcher  # noqa: F401

PAIRS = (("octopus", "chalk"), ("penguin", "gilded"))


@pytest.mark.parametrize(("content", "style"), PAIRS)
def test_retention_is_as_with_the_true_pictures(pack, content, style):
    """Of both merges on the true references, on noise that neither saw: within 15 per cent."""
    from benchmarks.studio import Studio, core, predictor

    studio = Studio()
    concepts = {"content": studio.concepts[content], "style": studio.concepts[style]}
    sources = studio.sources(*concepts.values())
    conditioning = {c: studio.prompt(t.learned.prompt) for c, t in concepts.items()}
    true = {c: {"samples": studio.latents(t)} for c, t in concepts.items()}
    settings = core.solver.Settings(solver="layerwise, then gradient")
    merges, shown = [], []
    for latents in (true, {"content": None, "style": None}, {"content": None, "style": true["style"]}):
        with torch.inference_mode():
            zipped, _, report, drawn = pack.nodes.bridge.optimize.zipping.optimize(
                studio.model,
                sources,
                conditioning,
                latents,
                settings,
                pack.nodes.bridge.drawing.sampling.ReferenceRequest(4, 128),
            )
        merges.append(zipped.coefficients)
        shown.append(None if drawn is None else tuple(drawn.shape))
        for seed, concept in enumerate(true):
            line = f"{concept} references: 4 drawn with its LoRA alone, latents of 16 x 16, seed {seed}"
            assert (line in report) == (latents[concept] is None), report
    assert shown == [None, (8, 256, 256, 3), (4, 256, 256, 3)]
    fitted = pack.nodes.bridge.lora.fitting.fit(sources, studio.model.model)
    found = []

    def measure(predict, joined, references):
        ones = core.coefficients.Coefficients.ones(fitted.loras)
        found.extend(core.retention.measure_retention(joined, predict, references, [ones, *merges], 77, draws=8))

    samples = {c: latent["samples"] for c, latent in true.items()}
    predictor.with_predictor(studio.model, fitted.loras, conditioning, samples, measure)
    direct, given, drawn_both, drawn_content = (sum(losses.values()) for losses in found)
    print(content, style, direct, given, drawn_both, drawn_content)
    assert given < 0.6 * direct
    assert max(drawn_both, drawn_content) < 1.15 * given


def test_the_same_pictures_one_by_one_where_memory_runs_out(pack, patcher, monkeypatch, caplog):  # noqa: F811
    import comfy.model_management as management
    import comfy.sample

    references = pack.nodes.bridge.drawing.sampling
    asked, prompt = references.ReferenceRequest(3, 64), tiny.prompts()["content"]
    with torch.inference_mode():
        at_once = references.draw_plain(patcher, prompt, asked, 5).latents
        sample, counts = comfy.sample.sample, []

        def short_of_memory(model, noise, *rest, **given):
            counts.append(len(noise))
            if len(noise) > 1:
                raise management.OOM_EXCEPTION("out of memory")
            return sample(model, noise, *rest, **given)

        monkeypatch.setattr(comfy.sample, "sample", short_of_memory)
        one_by_one = references.draw_plain(patcher, prompt, asked, 5).latents
    assert counts == [3, 1, 1, 1] and "not enough memory to draw 3 pictures at once; one by one" in caplog.text
    torch.testing.assert_close(one_by_one, at_once, rtol=1e-3, atol=1e-3)
    assert not torch.equal(at_once[0], at_once[1])
