"""An interrupt ends every long loop at once, without the host's progress hook, which newer hosts throttle."""

from __future__ import annotations

import pytest
import tiny
import torch


@pytest.fixture
def no_hook(monkeypatch):
    import comfy.utils

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", None)


def optimise(pack, patcher, latents=None, **settings):
    given = pack.ziplora_core.solver.Settings(**{"steps": 3, "solver": "layerwise, then gradient", **settings})
    asked = pack.nodes.bridge.drawing.sampling.ReferenceRequest(1, 64)
    with torch.inference_mode():
        return pack.nodes.bridge.optimize.zipping.optimize(
            patcher, tiny.sources(pack, patcher.model), tiny.prompts(), latents or tiny.latents(), given, asked
        )


def interrupting(place: str, at: int, monkeypatch, pack) -> list[int]:
    """Interrupt once the node's bar has heard of a place so many times; the list counts how often it has."""
    import comfy.model_management as management

    bar, heard = pack.nodes.bridge.progress.bar.Bar, []
    says = bar.at

    def at_bar(self, part, done, words, *rest, **more):
        says(self, part, done, words, *rest, **more)
        if words.startswith(place):
            heard.append(1)
            if len(heard) == at:
                management.interrupt_current_processing()

    monkeypatch.setattr(bar, "at", at_bar)
    return heard


@pytest.mark.parametrize(
    "place",
    [
        "drawing content",
        "drawing style",
        "looking at the layers",
        "layer",
        "gradient",
        "step",
        "measuring what",
        "measuring the",
    ],
)
def test_an_interrupt_ends_the_loop_that_runs(pack, monkeypatch, no_hook, place):
    import comfy.model_management as management

    heard = interrupting(place, 2, monkeypatch, pack)
    latents = {"content": None, "style": None} if place.startswith("drawing") else None
    with pytest.raises(management.InterruptProcessingException):
        optimise(pack, tiny.tiny_patcher(), latents)
    assert len(heard) == 2, "it went on"


def test_the_bar_divides_what_is_left_where_a_run_starts_again(pack, no_hook, monkeypatch):
    """One maximum, never back, and the end only at the end."""
    bar_module = pack.nodes.bridge.progress.bar
    sent = []
    monkeypatch.setattr(
        "comfy.utils.ProgressBar.update_absolute", lambda self, v, total, preview=None: sent.append((v, total))
    )
    bar = bar_module.Bar({"a": 1.0, "b": 3.0})
    bar.at("a", 1.0, "a")
    bar.at("b", 1.5, "b")
    assert sent[-1][0] == bar_module.WHOLE * 5 // 8
    bar.plan({"b": 2.0})
    bar.at("b", 0.0, "b")
    bar.at("b", 1.0, "b")
    assert sent[-1][0] == bar_module.WHOLE * 13 // 16
    bar.at("b", 99.0, "b")
    assert sent[-1][0] == bar_module.WHOLE - 1
    bar.finish("done")
    values = [value for value, _ in sent]
    assert (
        values == sorted(values)
        and {total for _, total in sent} == {bar_module.WHOLE}
        and values[-1] == bar_module.WHOLE
    )
