"""A zip is made once: a ComfyUI that starts again takes it from disk, and draws the very same picture."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from graphs import Concept, node, picture, text

from devhost.server import ComfyServer


@pytest.fixture
def graph(content: Concept, style: Concept) -> dict:
    files = {"subject_lora": content.lora, "style_lora": style.lora}
    words = {"subject_prompt": content.prompt, "style_prompt": style.prompt}
    zip_ = node(
        "ZipLoRAs", model=["checkpoint", 0], clip=["checkpoint", 1], **files, **words, quality="balanced", seed=1,
        drawn_size=64,
    )  # fmt: skip
    drawn = {**picture(["zip", 0], content.prompt), "zip": zip_, "report": node("PreviewAny", source=["zip", 3])}
    return {**drawn, "positive": {**text(content.prompt), "inputs": {"clip": ["zip", 1], "text": content.prompt}}}


def test_after_a_restart(fresh_server: Callable[..., ComfyServer], graph: dict) -> None:
    server = fresh_server(environment={"ZIPLORA_REMEMBER_MB": "50"})
    first = server.run(graph)
    picture_before, shown_before = first.images("save")[0], first.images("zip")
    (kept,) = (server.base / "user" / "ziplora_zips").glob("*.safetensors")
    server.stop()
    server.start()
    second = server.run(graph)
    before, after = (result.outputs["report"]["text"][0] for result in (first, second))
    assert "taken from disk" not in before and f"delete '{kept.name}' in ComfyUI's folder user/ziplora_zips" in after
    assert "zip" in second.executed and not [said for said in second.said("zip") if "drawing" in said]
    assert [said for said in first.said("zip") if "drawing" in said]
    assert second.said("zip")[-1] == first.said("zip")[-1], "the node's last words"
    assert np.array_equal(picture_before, second.images("save")[0])
    assert len(shown_before) == 8 and all(map(np.array_equal, shown_before, second.images("zip")))
