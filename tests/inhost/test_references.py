"""Zipping without pictures: each LoRA draws its own references."""

from __future__ import annotations

import pytest
import torch

PAIRS = (("mushroom", "ember"), ("icecream", "dusk"))


@pytest.mark.parametrize(("content", "style"), PAIRS)
def test_retention_is_as_with_the_true_pictures(pack, content, style):
    """Of both merges on the true references, on noise that neither saw: within 15 per cent."""
    from benchmarks.studio import Studio, core, predictor

    studio = Studio()
    concepts = {"content": studio.concepts[content], "style": studio.concepts[style]}
    sources = studio.sources(*concepts.values())
    conditioning = {c: studio.prompt(t.learned.prompt) for c, t in concepts.items()}
    true = {c: {"samples": studio.latents(t)} for c, t in concepts.items()}
    settings = core.solver.Settings()
    merges, shown = [], []
    for latents in (true, {"content": None, "style": None}, {"content": None, "style": true["style"]}):
        with torch.inference_mode():
            zipped, _, report, drawn = pack.nodes.bridge.optimise.optimise(
                studio.model, sources, conditioning, latents, settings, pack.nodes.bridge.references.Asked(4, 128)
            )
        merges.append(zipped.coefficients)
        shown.append(None if drawn is None else tuple(drawn.shape))
        for seed, concept in enumerate(true):
            line = f"{concept} references: 4 drawn with its LoRA alone, latents of 16 x 16, seed {seed}"
            assert (line in report) == (latents[concept] is None), report
    assert shown == [None, (8, 256, 256, 3), (4, 256, 256, 3)]
    fitted = pack.nodes.bridge.fitting.fit(sources, studio.model.model)
    found = []

    def measure(predict, joined, references):
        ones = core.coefficients.Coefficients.ones(fitted.pair)
        found.extend(core.solver.measure_retention(joined, predict, references, [ones, *merges], 77, draws=8))

    samples = {c: latent["samples"] for c, latent in true.items()}
    predictor.with_predictor(studio.model, fitted.pair, conditioning, samples, measure)
    direct, given, drawn_both, drawn_content = (sum(losses.values()) for losses in found)
    print(content, style, direct, given, drawn_both, drawn_content)
    assert given < 0.6 * direct
    assert max(drawn_both, drawn_content) < 1.15 * given
