"""What the server runs again, and what it hears while the optimise node works."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
from graphs import Concept, is_whole_run, node, optimised, read_report, zipped_picture
from safetensors.torch import load_file, save_file

from devhost.server import ComfyServer


def test_style_strength_alone_does_not_optimise_again(server: ComfyServer, content: Concept, style: Concept) -> None:
    settings = {"steps": 3, "seed": 21}
    first = server.run(zipped_picture(content, style, style_dial=1.0, **settings))
    assert len(first.progress("optimise")) >= 3
    second = server.run(zipped_picture(content, style, style_dial=0.4, **settings))
    assert {"checkpoint", "pair", "optimise"} <= second.cached
    assert second.progress("optimise") == []
    assert {"dial", "apply", "sampler"} <= set(second.executed)
    assert not np.array_equal(first.images("save")[0], second.images("save")[0])


def test_new_numbers_in_a_lora_file_optimise_again(
    server: ComfyServer, content: Concept, style: Concept, tmp_path: Path
) -> None:
    folder = server.base / "models" / "loras"
    name = server.put_lora(folder / content.lora, "rewritten.safetensors")
    mine = Concept(name, content.prompt, content.picture)
    graph = optimised(mine, style, steps=2, seed=22)
    first = server.run(graph)
    assert "optimise" in server.run(graph).cached, "nothing had changed"
    tensors = load_file(folder / name)
    save_file({k: v if "alpha" in k else v * 0.5 for k, v in tensors.items()}, tmp_path / name)
    (tmp_path / name).replace(folder / name)
    second = server.run(graph)
    assert {"pair", "optimise"} <= set(second.executed)
    assert is_whole_run(second, 2)
    before, after = (read_report(result.text("report")) for result in (first, second))
    assert before.content[0] != after.content[0], "the figures are still those of the old numbers"


def test_every_step_is_heard_and_losses_are_drawn(server: ComfyServer, content: Concept, style: Concept) -> None:
    steps = 6
    result = server.run(optimised(content, style, steps=steps, seed=23))
    assert is_whole_run(result, steps)
    assert result.previews >= 1  # this graph samples nothing, so only the optimise node draws


def test_losses_plot_and_report_shows(server: ComfyServer, content: Concept, style: Concept) -> None:
    graph = optimised(content, style, steps=4, seed=24)
    graph["plot"] = node("LossGraphNode", loss=["optimise", 1], filename_prefix="losses")
    graph["losses"] = node("PreviewAny", source=["optimise", 1])
    result = server.run(graph)
    plot = result.images("plot")[0]
    assert len(np.unique(plot.reshape(-1, 3), axis=0)) > 2, "the plot shows axes only"
    losses = json.loads(result.text("losses"))
    assert {name: len(values) for name, values in losses.items()} == dict.fromkeys(
        ("loss", "content", "style", "overlap"), 4
    )
    report = result.text("report")
    assert content.lora in report and style.lora in report
    assert "steps: 4 of 4" in report
    read_report(report)


def test_references_may_differ_in_size_number_and_length_of_prompt(
    server: ComfyServer, content: Concept, style: Concept
) -> None:
    """They cannot share a pass then: content and style go through the model one after the other."""
    long = replace(style, prompt=" ".join([style.prompt] * 8))
    graph = optimised(content, long, steps=2, batch_size=2, seed=25)
    graph["content_batch"] = node("RepeatLatentBatch", samples=graph["optimise"]["inputs"]["content_latents"], amount=3)
    graph["optimise"]["inputs"]["content_latents"] = ["content_batch", 0]
    graph["wide"] = node(
        "ImageScale", image=["style_picture", 0], upscale_method="bilinear", width=160, height=96, crop="disabled"
    )
    graph["style_latents"]["inputs"]["pixels"] = ["wide", 0]
    result = server.run(graph)
    assert is_whole_run(result, 2)
    report = read_report(result.text("report"))
    assert all(math.isfinite(figure) and figure > 0 for figure in (*report.content, *report.style))
