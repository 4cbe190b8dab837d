"""What the batch command makes of a real server's own ways: outputs that it drops, and a cache that outlives files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from graphs import node
from PIL import Image

from devhost.batches import LightBatch
from devhost.server import ComfyServer


@pytest.fixture
def batch(tmp_path: Path) -> LightBatch:
    return LightBatch(tmp_path / "batch", 3)


def test_a_row_whose_picture_the_server_drops_is_refused(server: ComfyServer, batch: LightBatch):
    """ComfyUI accepts a prompt of which one output is valid, and runs that alone."""
    graph = json.loads(batch.workflow.read_text(encoding="utf-8"))
    graph["show"] = node("PreviewAny", source="the report")
    batch.workflow.write_text(json.dumps(graph), encoding="utf-8")
    rows = [batch.row(number) for number in range(3)]
    rows[0]["width"] = 0
    batch.write(rows)
    status, said = batch.run(server.url)
    assert status == 1, said
    cells = batch.cells()
    assert [cell["status"] for cell in cells] == ["refused", "done", "done"]
    assert cells[0]["error"].startswith("EmptyImage (draw): Value 0 smaller than min of 1: ")


def colour(path: Path) -> int:
    return int.from_bytes(np.asarray(Image.open(path).convert("RGB"))[0, 0].tobytes(), "big")


@pytest.mark.parametrize("gone", [False, True])
def test_a_cache_that_outlives_its_file_brings_no_other_picture(server: ComfyServer, batch: LightBatch, gone: bool):
    """The server has the rows in its cache, by the names of files which are others' now, or nobody's."""
    assert batch.run(server.url)[0] == 0
    other, *_, mine = batch.kept()
    (theirs,) = (server.base / "output" / batch.mark).glob("r2_*.png")
    theirs.unlink() if gone else theirs.write_bytes(other.read_bytes())
    mine.unlink()
    status, said = batch.run(server.url)
    assert status == 0, said
    assert colour(batch.kept()[2]) == batch.colour(2)
    assert batch.drawn(server) == {"r0": 1, "r1": 1, "r2": 1 if gone else 2}
