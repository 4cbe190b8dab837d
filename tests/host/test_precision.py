"""The model loaded as ComfyUI's own flags load it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from graphs import BASE, Concept, is_whole_run, picture, read_report, zipped_picture

from devhost.server import ComfyServer


@pytest.mark.parametrize(
    ("flag", "dtype", "tolerance"),
    [
        ("--fp16-unet", "float16", 0.02),
        ("--bf16-unet", "bfloat16", 0.05),
        ("--fp8_e4m3fn-unet", "float8_e4m3fn", 0.3),
    ],
)
def test_zips_a_model_in_low_precision(
    server: ComfyServer,
    fresh_server: Callable[..., ComfyServer],
    content: Concept,
    style: Concept,
    flag: str,
    dtype: str,
    tolerance: float,
) -> None:
    """The direct merge loses about what it loses in float32, steps run, and the model is left as it was."""
    graph = zipped_picture(content, style, steps=2, seed=31)
    exact = read_report(server.run(graph).text("report"))
    low = fresh_server(flag)
    before = low.run(picture(BASE, content.prompt)).images("save")[0]
    assert f"model weight dtype torch.{dtype}" in low.log()
    result = low.run(graph)
    assert is_whole_run(result, 2)
    report = read_report(result.text("report"))
    print(flag, report, exact)
    assert report.content[0] == pytest.approx(exact.content[0], rel=tolerance)
    assert report.style[0] == pytest.approx(exact.style[0], rel=tolerance)
    assert not np.array_equal(result.images("save")[0], before)
    again = low.run(picture(BASE, content.prompt))
    assert "sampler" in again.executed and "checkpoint" in again.cached
    assert np.array_equal(again.images("save")[0], before)
