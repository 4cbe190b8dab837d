"""Shipped pairs with default settings: both concepts kept better than by the direct merge."""

from __future__ import annotations

import os
from itertools import product

from graphs import Concept, optimised, read_report

from devhost.server import ComfyServer

AFFORDABLE = 12  # pairs: some ten seconds each on two cores


def chosen_pairs(concepts: dict[str, list[Concept]]) -> list[tuple[Concept, Concept]]:
    """Every pair where they are few or with `dev.py test --all`; else pairs in which every LoRA takes part."""
    content, style = concepts["content"], concepts["style"]
    if len(content) * len(style) <= AFFORDABLE or os.environ.get("ZIPLORA_ALL"):
        return list(product(content, style))
    return [(content[i % len(content)], style[i % len(style)]) for i in range(max(len(content), len(style)))]


def test_pairs_keep_more_than_the_direct_merge(server: ComfyServer, concepts: dict[str, list[Concept]]) -> None:
    inputs = server.object_info("ZipLoRAOptimize")["input"]
    inputs = {**inputs["required"], **inputs["optional"]}
    defaults = {name: given[1]["default"] for name, given in inputs.items() if "default" in given[1]}
    assert (defaults["solver"], defaults["steps"]) == ("layerwise", 10)
    lines, failed = [], []
    for content, style in chosen_pairs(concepts):
        result = server.run(optimised(content, style, **defaults))
        report = read_report(result.text("report"))
        (direct, zipped), (apart, closed) = report.retention, report.overlap
        lines.append(
            f"{content.lora} + {style.lora}: retention {direct:.4g} -> {zipped:.4g}, "
            f"overlap {apart:.3f} -> {closed:.3f}, {result.seconds:.0f} s"
        )
        if not (zipped < direct and closed < apart):
            failed.append(lines[-1])
    print("mean retention loss on held-out noise, direct merge -> zipped", *lines, sep="\n")
    assert lines and not failed, "\n".join(failed)
