"""What a user sees while the optimise node works: one bar over everything, the time left, and what came of it."""

from __future__ import annotations

import re

import pytest
from graphs import Concept, is_one_bar, is_whole_run, optimised
from test_references import without

from devhost.answers import Result
from devhost.server import ComfyServer

PARTS = (
    "drawing content references",
    "drawing style references",
    "looking at the layers",
    "gradient steps",
    "measuring what is kept",
    "measuring the prompts",
)


@pytest.fixture(scope="module")
def drawn(session_server: ComfyServer, content: Concept, style: Concept) -> Result:
    """A run without pictures, of every part."""
    graph = optimised(content, style, steps=4, seed=61, drawn_references=2, drawn_size=128)
    return session_server.run(without(graph, "content", "style"))


def test_one_bar_over_drawing_layers_steps_and_measuring(drawn: Result) -> None:
    assert is_whole_run(drawn, 4), drawn.progress("optimise")
    states = [e.data["nodes"].get("optimise") for e in drawn.events if e.type == "progress_state"]
    bar = [(s["value"], s["max"]) for s in states if s and s["state"] == "running" and s["max"] > 1]
    assert bar and bar == sorted(bar), "the bar on the node falls"


def test_every_part_is_named_and_takes_its_share_of_the_bar(drawn: Result) -> None:
    """No part is hurried through: the bar that went from 88 to 98 in the steps told nothing of them."""
    said = drawn.said("optimise")
    first = [next(i for i, text in enumerate(said) if text.startswith(part)) for part in PARTS]
    assert first == sorted(first)
    begins = [int(re.search(r"; (\d+)%", said[i])[1]) for i in first]
    assert begins[0] <= 2 and all(b - a >= 3 for a, b in zip(begins, [*begins[1:], 100], strict=True)), begins
    percents = [int(found[1]) for text in said if (found := re.search(r"; (\d+)%", text))]
    assert percents == sorted(percents)


def test_the_time_that_is_left_is_on_the_node_and_in_the_log(drawn: Result) -> None:
    said = [text for text in drawn.said("optimise") if ", about " in text]
    assert said and all(re.search(r"\d+%, about \d+ (s|min) left$", text) for text in said)
    log = drawn.server.log()
    assert all(f"ZipLoRA: {part}; " in log for part in PARTS)
    assert re.search(r"ZipLoRA: measuring the prompts; \d+%, about \d+ s left\.", log)


def test_the_verdict_is_the_last_word_and_the_last_picture(drawn: Result) -> None:
    kept = drawn.said("optimise")[-1].splitlines()
    assert kept[0].startswith("Zipping ") and kept[0].endswith(".")
    change = r"(\d+ % (better|worse)|the same)"
    assert re.fullmatch(rf"subject kept {change} (than|as by) stacking, style ({change}|\d+ %)", kept[1])
    assert kept == [line.rstrip() for line in drawn.text("report").partition("cost: ")[0].splitlines()]
    own = [event for event in drawn.events if event.type in ("progress", "preview")]
    assert own[-1].type == "preview" or own[-2].type == "preview", "no picture came with the end of the bar"


def test_an_interrupted_bar_never_shows_the_end(server: ComfyServer, content: Concept, style: Concept) -> None:
    prompt_id = server.queue(optimised(content, style, steps=500, seed=62))
    server.wait_for_text(prompt_id, "optimise", "step 1 of 500")
    server.interrupt()
    result = server.finish(prompt_id)
    assert result.interrupted and is_one_bar(result.progress("optimise"), ended=False)
