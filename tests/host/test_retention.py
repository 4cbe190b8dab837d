"""Every shipped pair, 100 steps with default settings: both concepts kept better than by the direct merge."""

from __future__ import annotations

from graphs import Concept, optimised, read_report

from devhost.server import ComfyServer

STEPS = 100


def test_every_pair_keeps_more_than_the_direct_merge(server: ComfyServer, concepts: dict[str, list[Concept]]) -> None:
    lines, failed = [], []
    for content in concepts["content"]:
        for style in concepts["style"]:
            info = server.object_info("ZipLoRAOptimize")["input"]["required"]
            assert info["steps"][1]["default"] == STEPS
            defaults = {k: v[1]["default"] for k, v in info.items() if "default" in v[1]}
            report = read_report(server.run(optimised(content, style, **defaults)).text("report"))
            (direct, zipped), (apart, closer) = report.retention, report.overlap
            lines.append(f"{content.lora} + {style.lora}: {direct:.4g} -> {zipped:.4g}, overlap {closer:.3f}")
            if not (zipped < direct and closer < apart):
                failed.append(lines[-1])
    print("mean retention loss on held-out noise, direct merge -> zipped", *lines, sep="\n")
    assert lines and not failed, "\n".join(failed)
