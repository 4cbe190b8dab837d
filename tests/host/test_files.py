"""Saving, loading and exporting through a real server: the same pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from graphs import BASE, Concept, Prompt, node, optimised, picture, stock_loader, zipped_picture

from devhost.answers import PromptRefused
from devhost.base import NODES
from devhost.large_files import sparse_lora
from devhost.server import ComfyServer

SETTINGS = {"steps": 3, "learning_rate": 0.05, "seed": 41}


def test_every_node_is_offered(server: ComfyServer) -> None:
    offered = {name for name, info in server.object_info().items() if info["category"].split("/")[0] == "ZipLoRA"}
    assert offered == set(NODES)


def loaded_picture(file: str, content: Concept) -> Prompt:
    """A picture of a zipped pair from its saved file."""
    return {
        **picture(["apply", 0], content.prompt),
        "load": node("LoadZippedLoRA", model=BASE, zipped=file),
        "apply": node("ApplyZippedLoRA", model=BASE, zipped_lora=["load", 0], strength=1.0),
        "report": node("PreviewAny", source=["load", 1]),
    }


def test_saved_and_loaded_draws_the_same(server: ComfyServer, content: Concept, style: Concept) -> None:
    graph = zipped_picture(content, style, style_dial=0.7, **SETTINGS)
    graph["file"] = node("SaveZippedLoRA", zipped_lora=["dial", 0], filename_prefix="pairs/mine")
    first = server.run(graph)
    file = first.text("file")
    assert (server.base / "output" / "ziplora" / file).is_file()
    again = server.run(loaded_picture(file, content))
    assert "optimise" not in again.executed
    assert np.array_equal(first.images("save")[0], again.images("save")[0])
    assert again.text("report") == first.text("report")


def test_the_report_is_drawn_in_the_graph(server: ComfyServer, content: Concept, style: Concept) -> None:
    graph = optimised(content, style, **SETTINGS)
    graph["drawn"] = node(
        "ZippedLoRAReport", zipped_lora=["optimise", 0], loss_map=["optimise", 1], layout="one picture"
    )
    (shown,) = server.run(graph).images("drawn")
    assert min(shown.shape[:2]) > 1000 and shown.std() > 5


def test_missing_saved_file_is_refused_when_queued(server: ComfyServer, content: Concept) -> None:
    with pytest.raises(PromptRefused) as caught:
        server.queue(loaded_picture("nowhere.safetensors", content))
    assert "nowhere.safetensors" in caught.value.messages("load")


@pytest.mark.parametrize(("dtype", "largest", "share"), [("fp32", 1, 1e-3), ("fp16", 8, 0.5)])
def test_exported_file_draws_the_same_in_the_stock_loader(
    server: ComfyServer, content: Concept, style: Concept, dtype: str, largest: int, share: float
) -> None:
    graph = zipped_picture(content, style, style_dial=1.2, **SETTINGS)
    export = {"filename_prefix": f"loras/{dtype}", "rank": 0, "dtype": dtype, "format": "kohya"}
    graph["export"] = node("ExportMergedLoRA", zipped_lora=["dial", 0], **export)
    graph["given"] = node("LoraModelLoader", model=BASE, lora=["export", 0], strength_model=1.0)
    first = server.run(graph)
    assert "written: loras/" in first.text("export")
    stock = {**picture(["loader", 0], content.prompt)}
    stock["loader"] = stock_loader(f"{dtype}_00001_.safetensors", BASE)
    theirs = server.run(stock).images("save")[0]
    difference = np.abs(first.images("save")[0].astype(int) - theirs.astype(int))
    assert difference.max() <= largest and (difference > 0).mean() < share


@pytest.mark.parametrize("method", ["sum", "shared columns", "NP-LoRA"])
def test_direct_merge_needs_no_pictures(server: ComfyServer, content: Concept, style: Concept, method: str) -> None:
    graph = picture(["apply", 0], content.prompt)
    graph["pair"] = optimised(content, style)["pair"]
    graph["merge"] = node("DirectMergeLoRA", model=BASE, lora_pair=["pair", 0], method=method)
    graph["apply"] = node("ApplyZippedLoRA", model=BASE, zipped_lora=["merge", 0], strength=1.0)
    drawn = server.run(graph).images("save")[0]
    zero = server.run(zipped_picture(content, style, steps=0)).images("save")[0]
    assert np.array_equal(drawn, zero) == (method == "sum")


def test_a_prompt_with_large_files_is_validated_from_their_headers(
    server: ComfyServer, content: Concept, style: Concept
) -> None:
    """The server answers nobody while it validates. Read or mapped: both of it would show, as bytes or as memory."""
    about = Path(f"/proc/{server.check_alive().pid}")
    if not (about / "io").exists():
        pytest.skip("what a process reads is told by Linux's /proc")
    loras = [server.base / "models" / "loras" / f"large {side}.safetensors" for side in ("a", "b")]
    graph = optimised(*(Concept(path.name, "a star", content.picture) for path in loras), steps=-1)

    def bytes_read() -> int:
        return int((about / "io").read_text().split()[1])

    def most_memory() -> int:
        (line,) = (line for line in (about / "status").read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])

    with pytest.raises(PromptRefused):  # for its steps, after everything before them
        server.queue(optimised(content, style, steps=-1))
    for path in loras:
        sparse_lora(path)
    (about / "clear_refs").write_text("5")  # the most memory is that of now
    read, held = bytes_read(), most_memory()
    with pytest.raises(PromptRefused) as caught:
        server.queue(graph)
    for path in loras:
        path.unlink()
    assert list(caught.value.node_errors) == ["optimise"], "the pair was not validated, or refused"
    assert bytes_read() - read < 4e6 and most_memory() - held < 50e6
