"""What the report and the node say of a zip: only what was measured, and never success where a number is none."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import tiny
import torch

NAN, INF = math.nan, math.inf


NAMES = ("content", "style", "other", "other 2")
PAPER = "column|coefficient|lambda|ridge|retention|objective|layerwise|content"
AWAKE, ASLEEP = {"own": 0.9, "empty": 0.1}, {"own": 0.1, "empty": 0.1}


def sources_of(pack, patcher, names=NAMES[:2]):
    """LoRAs of random numbers, under these concepts."""
    loras, full_size = pack.nodes.bridge.lora.loras, tiny.full_size
    made = {
        name: loras.LoRASource(f"{name} file", full_size.attention_lora(patcher.model, 4, seed, torch.float32), 1.0)
        for seed, name in enumerate(names)
    }
    return loras.LoRASources(made)


def outcome_of(pack, before: dict[str, float], after: dict[str, float], names=None, **given):
    bridge, core = pack.nodes.bridge, pack.ziplora_core
    patcher = tiny.tiny_patcher()
    sources = sources_of(pack, patcher, names or list(before))
    fitted = given.pop("fitted", None) or bridge.lora.fitting.fit(sources, patcher.model)
    ones = core.coefficients.Coefficients.ones(fitted.loras)
    result = core.solver.Result(ones)
    settings = given.pop("settings", core.solver.Settings())
    retention = [before, after] if before else []
    return bridge.optimize.outcome.Outcome(sources, fitted, settings, ones, result, retention=retention, **given)


def effects(pack, **gains):
    """What prompts do, by concept."""
    return {c: pack.ziplora_core.prompts.PromptEffect(gain, gain) for c, gain in gains.items()}


def said(pack, outcome) -> list[str]:
    """The report's lines above its details, which hold no word of the paper."""
    above, found, below = pack.nodes.bridge.optimize.report.report(outcome).partition("  \ndetails  \n")
    assert found and below and not re.search(PAPER, above), above
    return above.split("  \n")


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("concept", ["content", "style"])
def test_a_loss_that_is_not_finite_is_no_success(pack, bad, where, concept):
    retention = [{"content": 2.0, "style": 2.0}, {"content": 1.0, "style": 1.0}]
    retention[where][concept] = bad
    outcome = outcome_of(pack, *retention)
    report = pack.nodes.bridge.optimize.report.report(outcome)
    (line,) = (line for line in report.splitlines() if line.startswith(f"{concept} retention"))
    assert "%" not in line
    verdict, kept, advice = said(pack, outcome)
    assert "helped" not in verdict.replace("whether zipping helped", "") and "not finite" in verdict
    who, other = ("subject", "style") if concept == "content" else ("style", "subject")
    assert kept == f"{other} kept 50 % better than stacking, {who} not measured (not finite)"
    assert "bf16" in advice
    assert pack.nodes.bridge.optimize.verdict.lines(outcome) == [verdict, kept, advice]


def test_shares_are_those_of_the_losses(pack):
    outcome = outcome_of(pack, {"content": 2.0, "style": 4.0}, {"content": 0.5, "style": 3.0})
    report = pack.nodes.bridge.optimize.report.report(outcome)
    assert "2 direct merge, 0.5 zipped (25%)" in report and "4 direct merge, 3 zipped (75%)" in report
    assert pack.nodes.bridge.optimize.verdict.lines(outcome) == [
        "Zipping helped: subject and style are both kept better than by plain stacking.",
        "subject kept 75 % better than stacking, style 25 %",
    ]
    worse = outcome_of(pack, {"content": 2.0, "style": 4.0}, {"content": 2.0, "style": 4.5})
    verdict, kept, advice = said(pack, worse)
    assert verdict.startswith("Zipping did not help") and "LoRA loaders in a row" in advice
    assert kept == "subject kept the same as by stacking, style 12 % worse"


@pytest.mark.parametrize(
    ("after", "verdict", "change"),
    [
        ((1, 1, 1), "helped: all 3 LoRAs are kept better than", ("50 % better", "75 %", "90 %")),
        ((1, 5, 1), "helped on the whole, but the style is kept worse", ("50 % better", "25 % worse", "90 % better")),
        ((3, 5, 1), "helped on the whole, but the subject and style are kept worse",
         ("50 % worse", "25 % worse", "90 % better")),
        ((2, 4, 1), "helped: the other is kept better than by plain stacking, and none is worse",
         ("the same", "the same", "90 % better")),
        ((2, 4, 9.999), "changed next to nothing", ("the same", "the same", "the same")),
        ((2, 4, 20), "did not help", ("the same", "the same", "100 % worse")),
    ],
)  # fmt: skip
def test_verdicts_of_three(pack, after, verdict, change):
    before = {"content": 2.0, "style": 4.0, "other": 10.0}
    found = said(pack, outcome_of(pack, before, dict(zip(before, map(float, after), strict=True))))
    first, second, third = change
    kept = f"subject kept {first} {'as by' if first == 'the same' else 'than'} stacking, style {second}, other {third}"
    assert found[0].startswith(f"Zipping {verdict}") and found[1] == kept


def test_one_lora_and_what_was_not_learned_have_their_own_words(pack):
    settings = pack.ziplora_core.solver.Settings(steps=0)
    assert said(pack, outcome_of(pack, {}, {}, ["style"])) == [
        "One LoRA alone: it comes out as it is, there is nothing to merge it with."
    ]
    alone = pack.nodes.bridge.optimize.report.report(outcome_of(pack, {}, {}, ["style"]))
    assert not re.search("both|only|owned|overlap|alignment|0%", alone) and "layers: " in alone
    assert "steps is 0" in said(pack, outcome_of(pack, {}, {}, NAMES[:2], settings=settings))[0]
    assert "stopped before its end" in said(pack, outcome_of(pack, {}, {}, NAMES[:2]))[0]


def test_loras_that_share_no_layer_are_not_called_a_failure(pack):
    patcher = tiny.tiny_patcher()
    fitted = pack.nodes.bridge.lora.fitting.fit(sources_of(pack, patcher), patcher.model)
    apart = {
        key: {concept: layer[concept]}
        for number, (key, layer) in enumerate(fitted.loras.layers.items())
        for concept in [NAMES[number % 2]]
    }
    fitted = replace(fitted, loras=replace(fitted.loras, layers=apart))
    loss = {"content": 2.0, "style": 4.0}
    outcome = outcome_of(pack, loss, loss, fitted=fitted)
    report = pack.nodes.bridge.optimize.report.report(outcome)
    assert "share no layer" in said(pack, outcome)[0] and not re.search("did not help|owned|0 both|-0|neither", report)
    assert not outcome.dials_to_try


def test_warnings_of_prompts_stand_in_the_verdict_once(pack):
    before, after = dict.fromkeys(NAMES, 2.0), dict.fromkeys(NAMES, 1.0)
    gains = {**dict.fromkeys(NAMES, ASLEEP), "style": AWAKE}
    outcome = outcome_of(pack, before, after, prompts=effects(pack, **gains))
    verdict, _, files, advice = said(pack, outcome)
    assert files == "other: 'other file', other 2: 'other 2 file'"
    assert verdict.endswith("But the subject, other and other 2 prompts do not seem to wake their LoRAs.")
    assert "trigger word" in advice
    report = pack.nodes.bridge.optimize.report.report(outcome)
    assert report.count("A LoRA without a trigger") == 1
    swapped = {**ASLEEP, "other": 0.9}
    pair = outcome_of(pack, {"content": 2.0, "style": 2.0}, {"content": 1.0, "style": 1.0},
                      prompts=effects(pack, content=swapped, style=swapped))  # fmt: skip
    verdict, _, advice = said(pack, pair)
    assert verdict.endswith("But the two prompts seem to be swapped: each wakes the other LoRA.")
    assert "other way round" in advice and "not seem to wake" not in verdict


def test_words_are_asked_where_they_are_known(pack):
    """They speak to a LoRA that passes do not show to be woken, and tell best whether prompts are swapped."""
    words = pack.ziplora_core.words.WordEffect
    before, after = {"content": 2.0, "style": 2.0}, {"content": 1.0, "style": 1.0}
    outcome = outcome_of(pack, before, after, prompts=effects(pack, content=ASLEEP, style=ASLEEP))
    assert outcome.asleep == ["content", "style"]
    heard = {"content": words(2.0, {"style": 1.0}, (1.2,)), "style": words(1.0, {"content": 1.0}, (1.2,))}
    assert replace(outcome, words=heard).asleep == ["style"]
    assert replace(outcome, words={"content": heard["content"]}).asleep == ["style"]
    turned = {"content": words(1.0, {"style": 2.0}, (1.2,)), "style": words(0.8, {"content": 1.9}, (1.2,))}
    assert not outcome.swapped and replace(outcome, words=turned).swapped
    verdict, _, advice = said(pack, replace(outcome, words=turned))
    assert verdict.endswith("But the two prompts seem to be swapped: each wakes the other LoRA.")
    by_passes = {**ASLEEP, "other": 0.9}
    outcome = outcome_of(pack, before, after, prompts=effects(pack, content=by_passes, style=by_passes))
    assert outcome.swapped and not replace(outcome, words=heard).swapped


def test_no_report_says_nan_times(pack):
    """Ordinary prompts that say nothing, or numbers that are none, are no measure of other words."""
    words = pack.ziplora_core.words.WordEffect
    for own, ordinary in ((2.0, (0.0, 0.0)), (NAN, (NAN,)), (INF, (INF,)), (2.0, ())):
        heard = {"content": words(own, {}, ordinary), "style": words(2.4, {}, (1.2, 1.0))}
        outcome = outcome_of(pack, {"content": 2.0, "style": 2.0}, {"content": 1.0, "style": 1.0},
                             prompts=effects(pack, content=AWAKE, style=AWAKE), words=heard)  # fmt: skip
        report = pack.nodes.bridge.optimize.report.report(outcome)
        assert "style prompt: the layers of its LoRA that read the prompt answer to its words 2.00 times" in report
        assert not re.search(r"\b(nan|inf) times", report) and "cannot be compared with ordinary words'" in report


def test_no_zero_has_a_sign(pack):
    nearly = {"own": -0.001, "empty": 0.0001}
    prompts, alignment = effects(pack, content=nearly, style=nearly), [{"a": -1e-9}, {"a": 1e-9}]
    outcome = outcome_of(pack, {"content": 2.0, "style": 4.0}, {"content": 2.0001, "style": 3.9},
                         prompts=prompts, alignment=alignment)  # fmt: skip
    assert not re.search(r"-0(\.0+)?\b(?!\.)", pack.nodes.bridge.optimize.report.report(outcome))


@pytest.mark.parametrize(
    ("names", "says"),
    [(NAMES[:2], "Try style_strength 1.4 in Style Strength"), (NAMES, "Try 'style: 1.4' in Concept Strengths")],
)
def test_a_dial_is_advised_only_where_it_was_measured_to_help(pack, names, says):
    """The style is kept much worse than the others, and three trials say what a dial would do."""
    Tried = pack.nodes.bridge.optimize.outcome.Tried
    before = dict.fromkeys(names, 10.0)
    after = {**dict.fromkeys(names, 2.0), "style": 8.0}
    outcome = outcome_of(pack, before, after)
    assert outcome.dials_to_try == [("style", 1.2), ("style", 1.4)]
    trials = [Tried("style", dial, {**dict.fromkeys(names, 2.5), "style": style})
              for dial, style in ((1.2, 7.0), (1.4, 5.0))]  # fmt: skip
    (*_, advice) = said(pack, replace(outcome, tried=trials))
    others = ", other 75 %, other 2 75 %" if len(names) > 2 else ""
    without = 3 if len(names) > 2 else 2  # lines, where no dial is advised: of more than a pair, also whose files
    assert advice == f"{says}: measured so, subject kept 75 % better than stacking, style 50 %{others}."
    for useless in (7.8, 9.0, NAN):
        tried = [Tried("style", 1.2, {**after, "style": useless})]
        assert len(said(pack, replace(outcome, tried=tried))) == without
    assert len(said(pack, outcome)) == without
    spoils = [Tried("style", 1.2, {**after, "content": 9.0, "style": 1.0})]
    assert len(said(pack, replace(outcome, tried=spoils))) == without, "the subject pays for it"
    assert not replace(outcome, prompts=effects(pack, content=AWAKE, style=ASLEEP)).dials_to_try
    assert not outcome_of(pack, before, dict.fromkeys(names, 5.0)).dials_to_try


def test_a_dial_is_measured_as_it_will_be_turned(pack, monkeypatch):
    """Of a pair whose style is drowned: what is tried is what Style Strength then gives, on the same noise."""
    patcher, core = tiny.tiny_patcher(), pack.ziplora_core
    real, seen = core.retention.measure_retention, []

    def measure(joined, predictor, references, candidates, seed, **given):
        seen.append((candidates, seed, real(joined, predictor, references, candidates, seed, **given)))
        if len(seen) == 1:
            return [{"content": 2.0, "style": 2.0}, {"content": 1.0, "style": 1.9}]
        return seen[-1][2]

    monkeypatch.setattr(core.retention, "measure_retention", measure)
    effect = core.prompts.PromptEffect(AWAKE, AWAKE)
    monkeypatch.setattr(core.prompts, "measure", lambda *_, **__: {"content": effect, "style": effect})
    with torch.inference_mode():
        zipped, _, report, _ = pack.nodes.bridge.optimize.zipping.optimize(
            patcher, tiny.sources(pack, patcher.model), tiny.prompts(), tiny.latents(), core.solver.Settings()
        )
        dialled = pack.nodes.StyleStrength.execute(zipped, 1.2, 1.0).args[0]
    (_, seed, _), ((gentle, _), again, measured) = seen
    assert seed == again
    for concept in ("content", "style"):
        for name, m in gentle[concept].items():
            torch.testing.assert_close(m, dialled.coefficients[concept][name])
    found = ", ".join(f"{c} {loss:.4g}" for c, loss in measured[0].items())
    assert f"the same with style at 1.2: {found}" in report


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


def test_long_lines_stay_in_the_picture(pack):
    """Each is broken between words: nothing reaches the edge, and every word is drawn."""
    verdict = pack.nodes.bridge.optimize.verdict
    line = "Zipping helped: subject and style are both kept better than by plain stacking. " * 3
    shown = verdict.picture([line], None, {"content": torch.zeros(1, 8, 8, 3)})
    bare = verdict.picture([], None, {"content": torch.zeros(1, 8, 8, 3)})
    assert shown.width == bare.width and shown.height > bare.height + 4 * 20
    pixels = torch.frombuffer(bytearray(shown.tobytes()), dtype=torch.uint8).reshape(shown.height, shown.width, 3)
    assert (pixels[bare.height :, -10:].amax(-1) < 100).all(), "a line runs out of the picture"
    lettering = pack.nodes.bridge.progress.lettering
    parts = lettering.broken(line, 492, lettering.font(20))
    assert parts and " ".join(parts) == line.strip()


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
    content, style = studio.concepts["penguin"], studio.concepts["gilded"]
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
    verdict = report.splitlines()[0]
    assert ("But the subject prompt does not seem to wake its LoRA." in verdict) == (case == "cat"), report
    assert ("the two prompts seem to be swapped" in verdict) == (case == "swapped"), report
    assert ("But " in verdict) == (case != "right") == ("does not seem to wake" in report.partition("details")[2])


@pytest.mark.parametrize("solver", ["layerwise", "gradient"])
def test_numbers_of_a_spoiled_model_are_not_the_loras_fault(pack, solver):
    """Another node's patch of NaN on the model, and for comparison a LoRA that is too large itself."""
    core = pack.ziplora_core
    settings = core.solver.Settings(steps=1, solver=solver)
    patcher = tiny.tiny_patcher()
    spoiled = patcher.clone()
    key = "diffusion_model.input_blocks.0.0.weight"
    spoiled.add_patches({key: (torch.full_like(patcher.model.state_dict()[key], NAN),)}, 1.0)

    def zip_(model, sources):
        with torch.inference_mode(), pytest.raises(FloatingPointError) as caught:
            pack.nodes.bridge.optimize.zipping.optimize(model, sources, tiny.prompts(), tiny.latents(), settings)
        return str(caught.value)

    blames = "gives numbers that are not finite without these LoRAs too"
    assert blames in zip_(spoiled, tiny.sources(pack, patcher.model))
    absurd = tiny.sources(pack, patcher.model, strengths=(1e30, 1.0))
    assert blames not in zip_(patcher, absurd)
