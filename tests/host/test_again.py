"""`again` with files of strangers, and stopped: what a real server is asked to run, and is left with."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from graphs import Concept, node, zipped_picture
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from waiting import wait_until

from devhost.host import current_host
from devhost.server import ComfyServer
from ziplora_batch import trusted


def carrier(path: Path, prompt: dict[str, Any]) -> Path:
    """A PNG as Save Image writes one, of this workflow."""
    info = PngInfo()
    info.add_text("prompt", json.dumps(prompt))
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def start(root: Path, file: Path, server: ComfyServer, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ziplora_batch", "again", str(file), "--server", server.url, *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=root, preexec_fn=hears_ctrl_c, **pipes)


def hears_ctrl_c() -> None:
    """Also where the tests run in the background, whose processes ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def of(server: ComfyServer, prompt: dict[str, Any], *parts: str) -> list[str]:
    """Ids of this very prompt in parts of the queue, and in the history; others may use the server meanwhile."""
    queue = server.get("queue")
    found = [item for part in parts if part in queue for item in queue[part]]
    found += [entry["prompt"] for entry in server.get("history").values()] if "history" in parts else []
    return [item[1] for item in found if item[2] == prompt]


ANYWHERE = ("queue_running", "queue_pending", "history")


def test_a_strangers_nodes_are_not_run_unasked(root: Path, server: ComfyServer, tmp_path: Path):
    """Save Image Dataset to Folder takes any folder of the disk on hosts of 2025; newer ones refuse by themselves."""
    elsewhere = tmp_path / "elsewhere"
    graph = {
        "image": node("EmptyImage", width=8, height=8, batch_size=1, color=0),
        "evil": node(
            "SaveImageDataSetToFolder",
            images=["image", 0],
            folder_name=str(elsewhere),
            filename_prefix="left",
            mode="overwrite",  # of newer hosts
        ),
    }
    file = carrier(tmp_path / "gift.png", graph)
    said, errors = (refused := start(root, file, server)).communicate(timeout=120)
    assert refused.returncode == 2, said + errors
    assert "nodes: EmptyImage, SaveImageDataSetToFolder" in said
    assert "'SaveImageDataSetToFolder', which writes into any folder that the workflow names" in errors
    assert "EmptyImage" not in errors and "--yes" in errors and len(errors.splitlines()) == 1
    assert not of(server, graph, *ANYWHERE) and not elsewhere.exists()
    said, errors = (agreed := start(root, file, server, "--yes")).communicate(timeout=120)
    assert agreed.returncode == 2
    if "comfy_extras.nodes_dataset" in risky():
        assert "wrote no .png file" in errors, said + errors
        assert [path.name for path in elsewhere.iterdir()] == ["left_00000.png"], "what it was refused for is true"
    else:
        assert "failed: " in errors and not elsewhere.exists(), said + errors


def risky() -> set[str]:
    """Modules of the host's own nodes whose text writes into any folder, or runs what it is given."""
    signs = re.compile(r"join\(\s*folder_paths\.get_output_directory\(\), folder|(?<![.\w])(?:eval|exec)\(|subprocess")
    folder = current_host().tree / "comfy_extras"
    return {f"comfy_extras.{p.stem}" for p in folder.glob("*.py") if signs.search(p.read_text(encoding="utf-8"))}


def test_every_node_of_the_host_that_writes_elsewhere_or_runs_code_is_known():
    found, dataset = risky(), current_host().tree / "comfy_extras" / "nodes_dataset.py"
    assert found <= set(trusted._RISKS)
    safe = "secure_subfolder_path" in dataset.read_text(encoding="utf-8")  # as newer hosts are
    assert safe or "comfy_extras.nodes_dataset" in found, "what is looked for finds nothing"


def long(content: Concept, style: Concept, seed: int) -> dict[str, Any]:
    """No other test's."""
    return zipped_picture(content, style, steps=100, solver="gradient", seed=seed)


def test_stopping_takes_its_prompt_off_the_server(root: Path, server: ComfyServer, content: Concept, style: Concept):
    graph = long(content, style, 160_001)
    process = start(root, carrier(server.base / "mine.png", graph), server)
    (mine,) = wait_until(lambda: of(server, graph, "queue_running"))
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 130, said + errors
    assert errors == "stopped; the prompt was cancelled on the server\n"
    entry = wait_until(lambda: server.get("history").get(mine))
    assert entry["status"]["messages"][-1][0] == "execution_interrupted"
    assert not of(server, graph, "queue_running", "queue_pending")


def test_stopping_takes_a_waiting_prompt_out_of_the_queue(
    root: Path, server: ComfyServer, content: Concept, style: Concept
):
    before, graph = (long(content, style, seed) for seed in (160_002, 160_003))
    running = server.queue(before)
    process = start(root, carrier(server.base / "mine.png", graph), server)
    wait_until(lambda: of(server, graph, "queue_pending"))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130
    assert not of(server, graph, *ANYWHERE) and of(server, before, *ANYWHERE) == [running]
    server.post("interrupt", {"prompt_id": running}).raise_for_status()
    wait_until(lambda: of(server, before, "history"))
