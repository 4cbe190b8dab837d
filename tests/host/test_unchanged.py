"""Optimising changes nothing that came in: the loaded MODEL draws bit-equal before and after."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from graphs import BASE, Concept, is_one_bar, is_whole_run, marks, optimised, picture
from safetensors.torch import load_file, save_file

from devhost.answers import ExecutionFailed
from devhost.server import ComfyServer


@pytest.fixture
def check_unchanged(server: ComfyServer, content: Concept) -> Callable[[], None]:
    """Samples the bare model now; the result samples it again, from the same loaded checkpoint, and compares."""
    graph = picture(BASE, content.prompt)
    before = server.run(graph).images("save")[0]

    def check() -> None:
        result = server.run(graph)
        assert "checkpoint" in result.cached, "another model was loaded, so this shows nothing about the first"
        assert "sampler" in result.executed, "nothing was sampled again"
        assert np.array_equal(result.images("save")[0], before)

    return check


def test_after_optimising(
    server: ComfyServer, content: Concept, style: Concept, check_unchanged: Callable[[], None]
) -> None:
    result = server.run(optimised(content, style, steps=3, seed=11))
    assert "checkpoint" in result.cached
    assert len(result.progress("optimise")) >= 3
    check_unchanged()


def test_after_an_interrupt(
    server: ComfyServer, content: Concept, style: Concept, check_unchanged: Callable[[], None]
) -> None:
    prompt_id = server.queue(optimised(content, style, steps=500, seed=12))
    server.wait_for_text(prompt_id, "optimise", "step 2 of 500")
    server.interrupt()
    said = [event.data["text"] for event in server.events(prompt_id) if event.type == "progress_text"]
    reached = len([text for text in said if text.startswith("step")])
    result = server.finish(prompt_id, timeout=60)
    assert result.interrupted and is_one_bar(result.progress("optimise"), ended=False)
    # The step that runs when the interrupt arrives may end, and one event may still be on its way.
    assert len(marks(result)) - 1 <= reached + 2
    assert "report" not in result.outputs
    check_unchanged()
    again = server.run(optimised(content, style, steps=2, seed=12))
    assert is_whole_run(again, 2)


@pytest.mark.parametrize(
    ("solver", "complaint"),
    [("layerwise", "what the LoRAs do there is not finite"), ("gradient", "step 1: the loss is not finite")],
)
def test_after_an_error_inside_a_step(
    server: ComfyServer,
    content: Concept,
    style: Concept,
    tmp_path: Path,
    check_unchanged: Callable[[], None],
    solver: str,
    complaint: str,
) -> None:
    """A LoRA of finite but absurd numbers: the first forward pass overflows, with every layer injected."""
    tensors = load_file(server.base / "models" / "loras" / content.lora)
    absurd = {k: v if "alpha" in k else (v.float() + 1e-3) * 1e18 for k, v in tensors.items()}
    save_file(absurd, tmp_path / "absurd.safetensors")
    absurd_file = server.put_lora(tmp_path / "absurd.safetensors", f"absurd_{solver}.safetensors")
    bad = Concept(absurd_file, content.prompt, content.picture)
    with pytest.raises(ExecutionFailed) as caught:
        server.run(optimised(bad, style, steps=3, seed=13, solver=solver))
    assert caught.value.node == "optimise"
    assert complaint in caught.value.text
    check_unchanged()
