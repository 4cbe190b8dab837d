"""An interrupt ends every long loop at once, without the host's progress hook, which newer hosts throttle."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import save_file
from test_apply import zip_pair


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


def sparsified(pack, strike, folder):
    patcher = tiny.tiny_patcher()
    save_file(tiny.full_size.attention_lora(patcher.model, 2, 1), folder / "mine.safetensors")
    strike(pack.nodes.bridge.sparse, "top_elements")
    pack.nodes.bridge.sparse.sparsify(patcher, "mine.safetensors", 10.0)


def exported(pack, strike, folder):
    patcher = tiny.tiny_patcher()
    zipped = zip_pair(pack, patcher, tiny.sources(pack, patcher.model))
    strike(pack.nodes.bridge.export.export, "cut")
    pack.nodes.bridge.export.export_tensors(zipped, 2, "fp32", "kohya")


def scored(pack, strike, folder):
    encoder = SimpleNamespace(encode_image=lambda pictures: {"image_embeds": torch.ones(len(pictures), 4)})
    strike(encoder, "encode_image")
    pictures = torch.zeros(20, 8, 8, 3)  # more than are looked at at once
    pack.nodes.bridge.scores.score(pictures, pictures, pictures, encoder, encoder, None, "")


def shown_while_training(pack, strike, folder):
    progress = pack.nodes.bridge.training.progress.TrainingProgress(0, 9)
    strike(progress, "_picture")
    for index in range(1, 10):
        progress.step(pack.ziplora_core.training.Step(index, 9, 1.0))


@pytest.mark.parametrize("work", [sparsified, exported, scored, shown_while_training])
def test_an_interrupt_ends_work_at_the_step_in_which_it_comes(pack, monkeypatch, no_hook, tmp_path, work):
    import comfy.model_management as management
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    folder_paths.filename_list_cache.clear()
    calls = []

    def strike(module, name):
        own = getattr(module, name)

        def called(*given):
            calls.append(name)
            management.interrupt_current_processing()
            return own(*given)

        monkeypatch.setattr(module, name, called)

    with pytest.raises(management.InterruptProcessingException):
        work(pack, strike, tmp_path)
    assert len(calls) == 1, "it went on"


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
