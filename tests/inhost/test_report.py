"""What the report and the node say of a zip: only what was measured, and never success where a number is none."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

NAN, INF = math.nan, math.inf


def outcome_of(pack, before: dict[str, float], after: dict[str, float]):
    bridge, core = pack.nodes.bridge, pack.ziplora_core
    patcher = tiny.tiny_patcher()
    sources = tiny.sources(pack, patcher.model)
    fitted = bridge.lora.fitting.fit(sources, patcher.model)
    ones = core.coefficients.Coefficients.ones(fitted.loras)
    result = core.solver.Result(ones)
    return bridge.optimize.outcome.Outcome(
        sources, fitted, core.solver.Settings(), ones, result, retention=[before, after]
    )


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("concept", ["content", "style"])
def test_a_loss_that_is_not_finite_is_no_success(pack, bad, where, concept):
    retention = [{"content": 2.0, "style": 2.0}, {"content": 1.0, "style": 1.0}]
    retention[where][concept] = bad
    outcome = outcome_of(pack, *retention)
    report = pack.nodes.bridge.optimize.outcome.report(outcome)
    (line,) = (line for line in report.splitlines() if line.startswith(f"{concept} retention"))
    assert "%" not in line and "These losses are not finite" in report
    said = pack.nodes.bridge.optimize.verdict.lines(outcome)
    assert [line for line in said if line.startswith(concept)] == [f"{concept}: the loss of the merge is not finite"]


def test_shares_are_those_of_the_losses(pack):
    outcome = outcome_of(pack, {"content": 2.0, "style": 4.0}, {"content": 0.5, "style": 3.0})
    report = pack.nodes.bridge.optimize.outcome.report(outcome)
    assert "2 direct merge, 0.5 zipped (25%)" in report and "4 direct merge, 3 zipped (75%)" in report
    assert pack.nodes.bridge.optimize.verdict.lines(outcome) == [
        "content: 25% of the direct merge's loss is left",
        "style: 75% of the direct merge's loss is left",
    ]
    worse = outcome_of(pack, {"content": 2.0, "style": 4.0}, {"content": 2.0, "style": 4.5})
    assert "Zipping did not help this pair" in pack.nodes.bridge.optimize.outcome.report(worse)


def test_zipping_that_measures_nan_is_an_error(pack, monkeypatch):
    patcher, core = tiny.tiny_patcher(), pack.ziplora_core
    found = [{"content": 1.0, "style": 1.0}, {"content": 0.5, "style": NAN}]
    monkeypatch.setattr(core.retention, "measure_retention", lambda *_, **__: found)
    with torch.inference_mode(), pytest.raises(FloatingPointError, match="held-out noise is not finite"):
        pack.nodes.bridge.optimize.zipping.optimize(
            patcher,
            tiny.sources(pack, patcher.model),
            tiny.prompts(),
            tiny.latents(),
            core.solver.Settings(solver="layerwise"),
        )


def test_the_last_picture_holds_the_references_and_the_verdict(pack):
    verdict = pack.nodes.bridge.optimize.verdict
    red = torch.zeros(3, 64, 64, 3)
    red[..., 0] = 1.0
    blue = red.flip(-1)
    shown = verdict.picture(["one line", "another"], None, {"content": red, "style": blue})
    pixels = torch.frombuffer(bytearray(shown.tobytes()), dtype=torch.uint8).reshape(shown.height, shown.width, 3)
    for colour in ((255, 0, 0), (0, 0, 255)):
        share = (pixels == torch.tensor(colour, dtype=torch.uint8)).all(-1).sum().item()
        assert share >= 3 * 150 * 150, "the pictures are not there, or too small to see"
    below = verdict.picture([], None, {"content": red, "style": blue}).height
    assert (pixels[below - 20 :].amax(-1) > 200).any(), "the lines are not there"


def test_prompts_for_zipping_are_compared_with_the_hosts_own_zeros(pack):
    import nodes

    prompt = tiny.prompts()["content"]
    (theirs,) = nodes.ConditioningZeroOut().zero_out(prompt)
    (ours,) = pack.nodes.bridge.network.empty_prompt.zeros(prompt)
    assert torch.equal(ours[0], theirs[0][0])
    assert torch.equal(ours[1]["pooled_output"], theirs[0][1]["pooled_output"])


@pytest.mark.parametrize("case", ["right", "cat", "swapped"])
def test_wrong_prompts_are_told_from_right_ones(pack, case):
    """Of the shipped LoRAs, on the pictures that they were trained on."""
    from benchmarks.studio import Studio, core

    studio = Studio()
    content, style = studio.concepts["icecream"], studio.concepts["dusk"]
    words = {"content": content.learned.prompt, "style": style.learned.prompt}
    if case == "swapped":
        words = {"content": words["style"], "style": words["content"]}
    if case == "cat":
        words["content"] = "a photo of a cat"
    prompts = {c: studio.prompt(text) for c, text in words.items()}
    latents = {c: {"samples": studio.latents(t)} for c, t in (("content", content), ("style", style))}
    with torch.inference_mode():
        report = pack.nodes.bridge.optimize.zipping.optimize(
            studio.model, studio.sources(content, style), prompts, latents, core.solver.Settings(solver="layerwise")
        )[2]
    warned = [c for c in words if f"The {c} prompt does not seem to wake its LoRA" in report]
    assert warned == {"right": [], "cat": ["content"], "swapped": ["content", "style"]}[case], report
    assert ("the two prompts seem to be swapped" in report) == (case == "swapped")
