"""The optimise node without latents, on a real server."""

from __future__ import annotations

from graphs import Concept, Prompt, optimised, read_report

from devhost.server import ComfyServer


def without(graph: Prompt, *concepts: str) -> Prompt:
    """The graph with the reference pictures of some concepts taken out."""
    for concept in concepts:
        del graph[f"{concept}_latents"], graph[f"{concept}_picture"]
        del graph["optimise"]["inputs"][f"{concept}_latents"]
    return graph


def test_both_are_drawn_shown_and_reported(server: ComfyServer, content: Concept, style: Concept) -> None:
    graph = without(optimised(content, style, seed=51, drawn_references=3, drawn_size=128), "content", "style")
    result = server.run(graph)
    assert len(result.images("optimise")) == 6
    report = result.text("report")
    assert "content references: 3 drawn with its LoRA alone, latents of 16 x 16, seed 51" in report
    assert "style references: 3 drawn" in report
    found = read_report(report)
    assert found.retention[1] < found.retention[0]


def test_one_is_drawn_where_the_other_has_a_picture(server: ComfyServer, content: Concept, style: Concept) -> None:
    graph = without(optimised(content, style, seed=52, drawn_size=128), "style")
    result = server.run(graph)
    assert len(result.images("optimise")) == 4
    assert "style references: 4 drawn" in result.text("report") and "content references" not in result.text("report")


def test_no_steps_draw_nothing(server: ComfyServer, content: Concept, style: Concept) -> None:
    result = server.run(without(optimised(content, style, steps=0, seed=53), "content", "style"))
    assert result.progress("optimise") == [] and "drawn with" not in result.text("report")
