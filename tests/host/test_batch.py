"""The batch command against real servers: what it finishes, repeats, survives and says."""

from __future__ import annotations

import csv
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import Concept, node, picture, zipped_picture
from PIL import Image
from safetensors.torch import load_file, save_file
from waiting import wait_until

from devhost.base import make_base
from devhost.batches import LightBatch
from devhost.host import current_host
from devhost.process import free_port
from devhost.proxy import Proxy
from devhost.server import ComfyServer

Row = dict[str, Any]
SEEDS = itertools.count(100)
GATES = Path(__file__).resolve().parent.parent / "gates"
COLUMNS = ("content_lora", "style_lora", "content_prompt", "style_prompt", "content_picture", "style_picture")


def row(content: Concept, style: Concept, **more: Any) -> Row:
    return dict(
        zip(
            COLUMNS,
            (content.lora, style.lora, content.prompt, style.prompt, content.picture, style.picture),
            strict=True,
        ),
        **more,
    )


class Bench:
    """One batch: a workflow, a table, a folder of results."""

    def __init__(self, root: Path, folder: Path, content: Concept, style: Concept, steps: int = 1):
        self.root, self.folder = root, folder
        self.prompt = zipped_picture(content, style, steps=steps)
        self.workflow, self.table = folder / "workflow.json", folder / "pairs.jsonl"
        self.workflow.write_text(json.dumps(self.prompt), encoding="utf-8")

    def shut(self) -> Path:
        """A file without which no prompt ends."""
        gate = self.folder / "gate"
        self.prompt["gate"] = node("WaitAtGate", value=["decode", 0], gate=str(gate))
        self.prompt["save"]["inputs"]["images"] = ["gate", 0]
        self.workflow.write_text(json.dumps(self.prompt), encoding="utf-8")
        return gate

    def rows(self, rows: list[Row]) -> None:
        self.table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def command(self, servers: list[ComfyServer], *more: str) -> list[str]:
        addresses = [word for server in servers for word in ("--server", server.url)]
        command = [sys.executable, "-m", "ziplora_batch", "run", str(self.workflow), *addresses]
        source = [] if "--subjects" in more else ["--table", str(self.table)]
        return [*command, *source, "--results", str(self.folder / "results"), *more]

    def start(self, servers: list[ComfyServer], *more: str) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(self.command(servers, *more), cwd=self.root, **pipes)

    def run(self, servers: list[ComfyServer], *more: str) -> tuple[int, str]:
        """(exit status, everything said)"""
        process = self.start(servers, *more)
        said, errors = process.communicate(timeout=300)
        return process.returncode, said + errors

    def lines(self) -> list[dict[str, Any]]:
        log = self.folder / "results" / "results.jsonl"
        return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []

    def cells(self) -> list[dict[str, str]]:
        with (self.folder / "results" / "results.csv").open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def picture(self, cells: dict[str, str]) -> np.ndarray:
        path = self.folder / "results" / cells["files"]
        return np.asarray(Image.open(path).convert("RGB"))


def prompts_run(servers: list[ComfyServer]) -> int:
    return sum(len(server.get("history")) for server in servers)


@pytest.fixture
def bench(root: Path, tmp_path: Path, content: Concept, style: Concept) -> Bench:
    return Bench(root, tmp_path, content, style)


@pytest.fixture(scope="module")
def two(make_server: Callable[..., ComfyServer]) -> list[ComfyServer]:
    """Two servers, which no test here kills."""
    return [make_server(packs=[GATES]), make_server(packs=[GATES])]


@pytest.fixture
def pairs(concepts: dict[str, list[Concept]]) -> list[Row]:
    """Four pairs; seeds differ, from test to test too, so that no server has anything of theirs."""
    found = [(c, s) for c in concepts["content"][:2] for s in concepts["style"][:2]]
    return [row(c, s, **{"optimise.seed": next(SEEDS)}) for c, s in found]


def test_every_row_ends_in_its_own_picture_or_in_a_reason(two: list[ComfyServer], bench: Bench, pairs: list[Row]):
    missing = {**pairs[0], "style_lora": "nowhere.safetensors"}
    failing = dict(pairs[0])
    spoiled = load_file(two[0].base / "models" / "loras" / pairs[0]["content_lora"])
    save_file({k: v if "alpha" in k else (v.float() + 1e-3) * 1e18 for k, v in spoiled.items()}, bench.folder / "a")
    for server in two:
        failing["content_lora"] = server.put_lora(bench.folder / "a", "absurd_batch.safetensors")
    bench.rows([*pairs, missing, failing, pairs[0]])
    status, said = bench.run(two)
    assert status == 1, said
    cells = bench.cells()
    assert [c["status"] for c in cells] == ["done"] * 4 + ["refused", "error", "done"], said
    assert "'nowhere.safetensors' is missing" in cells[4]["error"] and cells[4]["error"].count("nowhere") == 1
    assert "ZipLoRAOptimize (optimise): FloatingPointError" in cells[5]["error"]
    assert {c["server"] for c in cells[:4]} == {server.url for server in two}, "one server did everything"
    assert len(bench.lines()) == 6, "the same row twice is one job"
    for made, given in zip(cells[:4], pairs, strict=True):
        assert f"content: {given['content_lora']}" in made["report"]
        alone = dict(bench.prompt)
        for key in ("pair", "content_prompt", "style_prompt", "content_picture", "style_picture", "optimise"):
            alone[key] = {**alone[key], "inputs": dict(alone[key]["inputs"])}
        alone["pair"]["inputs"].update(content_lora=given["content_lora"], style_lora=given["style_lora"])
        for concept in ("content", "style"):
            alone[f"{concept}_prompt"]["inputs"]["text"] = given[f"{concept}_prompt"]
            alone[f"{concept}_picture"]["inputs"]["image"] = given[f"{concept}_picture"]
        alone["optimise"]["inputs"]["seed"] = given["optimise.seed"]
        assert np.array_equal(bench.picture(made), two[0].run(alone).images("save")[0]), made["name"]


def test_a_second_run_repeats_nothing_but_what_has_changed(two: list[ComfyServer], bench: Bench, pairs: list[Row]):
    folder = bench.folder / "loras"
    folder.mkdir()
    for number, given in enumerate(pairs[:3]):
        source = two[0].base / "models" / "loras" / given["content_lora"]
        given["content_lora"] = f"own_{number}.safetensors"
        save_file(load_file(source), folder / given["content_lora"])
        for server in two:
            server.put_lora(folder / given["content_lora"])
    bench.rows(pairs[:3])
    before = prompts_run(two)
    assert bench.run(two, "--files", str(folder))[0] == 0
    assert prompts_run(two) == before + 3
    assert bench.run(two, "--files", str(folder))[0] == 0
    assert prompts_run(two) == before + 3, "a finished row was run again"
    old = load_file(folder / "own_1.safetensors")
    save_file({k: v if "alpha" in k else v * 0.5 for k, v in old.items()}, folder / "own_1.safetensors")
    for server in two:
        server.put_lora(folder / "own_1.safetensors")
    assert bench.run(two, "--files", str(folder))[0] == 0
    assert prompts_run(two) == before + 4, "one file changed"


def all_running(servers: list[ComfyServer]) -> bool:
    return all(server.get("queue")["queue_running"] for server in servers)


def test_a_server_that_dies_loses_only_its_prompt(
    make_server: Callable[..., ComfyServer], bench: Bench, pairs: list[Row]
):
    servers = [make_server(packs=[GATES]), make_server(packs=[GATES])]
    gate = bench.shut()
    try:
        bench.rows(pairs)
        batch = bench.start(servers, "--lost-after", "1")
        wait_until(lambda: all_running(servers), 60.0)
        victim, survivor = servers
        victim.check_alive().kill()
        gate.touch()
        said, errors = batch.communicate(timeout=300)
        assert batch.returncode == 0, said + errors
        assert "it goes to another server" in said
        statuses = [line["status"] for line in bench.lines()]
        assert sorted(statuses) == ["done"] * 4 + ["lost"]
        assert len(survivor.get("history")) == 4
    finally:
        for server in servers:
            server.stop()


def test_a_client_that_dies_finds_its_prompt_again(two: list[ComfyServer], bench: Bench, pairs: list[Row]):
    gate = bench.shut()
    bench.rows(pairs[:3])
    before = prompts_run(two)
    batch = bench.start(two)
    wait_until(lambda: all_running(two), 60.0)
    batch.kill()
    batch.wait()
    gate.touch()
    status, said = bench.run(two)
    assert status == 0, said
    assert prompts_run(two) == before + 3, "a prompt that was running was queued again"
    assert [c["status"] for c in bench.cells()] == ["done"] * 3


def test_stopping_the_client_stops_the_prompts_and_the_next_run_goes_on(
    two: list[ComfyServer], bench: Bench, pairs: list[Row]
):
    gate = bench.shut()
    bench.rows(pairs[:2])
    batch = bench.start(two)
    wait_until(lambda: all_running(two), 60.0)
    batch.send_signal(signal.SIGINT)
    said, errors = batch.communicate(timeout=60)
    assert batch.returncode == 130, said + errors
    assert "the same command goes on from here" in errors and "Traceback" not in said + errors
    wait_until(lambda: not any(s.get("queue")["queue_running"] for s in two), 20)
    assert {line["status"] for line in bench.lines()} == {"interrupted"}
    assert [c["status"] for c in bench.cells()] == ["interrupted"] * 2
    gate.touch()
    assert bench.run(two)[0] == 0
    assert [c["status"] for c in bench.cells()] == ["done"] * 2


def test_a_connection_that_is_cut_again_and_again_harms_no_prompt(two: list[ComfyServer], tmp_path: Path):
    gate = tmp_path / "gate"
    batch = LightBatch(tmp_path / "batch", 2, gate)
    with Proxy(two[0].url, socket_seconds=0.1) as proxy:
        client = batch.start(proxy.url)
        wait_until(lambda: proxy.sockets >= 6 or client.poll() is not None, 60.0)
        gate.touch()
        said, _ = client.communicate(timeout=60)
    assert client.returncode == 0, said
    batch.check(two[0])
    assert [line["status"] for line in batch.lines()] == ["done"] * 2


def test_without_any_server_the_rest_is_said_to_be_not_run(root: Path, bench: Bench, pairs: list[Row], tmp_path: Path):
    nobody = ComfyServer(tmp_path)
    nobody.port = free_port()
    bench.rows(pairs)
    status, said = bench.run([nobody], "--patience", "2")
    assert status == 2 and "no server has answered" in said
    assert [c["status"] for c in bench.cells()] == ["not run"] * 4


def test_two_folders_with_prompts_and_pictures(
    two: list[ComfyServer], bench: Bench, concepts: dict[str, list[Concept]]
):
    for side, kind in (("subjects", "content"), ("styles", "style")):
        (bench.folder / side).mkdir()
        for concept in concepts[kind][:2]:
            stem = bench.folder / side / Path(concept.lora).stem
            stem.with_suffix(".safetensors").write_bytes((two[0].base / "models" / "loras" / concept.lora).read_bytes())
            stem.with_suffix(".txt").write_text(concept.prompt, encoding="utf-8")
            stem.with_suffix(".png").write_bytes((two[0].base / "input" / concept.picture).read_bytes())
    folders = ("--subjects", str(bench.folder / "subjects"), "--styles", str(bench.folder / "styles"))
    status, said = bench.run(two, *folders, "--prompt", "{content} and {style}")
    assert status == 0, said
    cells = bench.cells()
    assert len(cells) == 4 and len({c["name"] for c in cells}) == 4
    for made in cells:
        assert made["prompt"] == f"{made['content_prompt']} and {made['style_prompt']}"
        assert f"style: {made['style_lora']}" in made["report"]
    assert len({bench.picture(c).tobytes() for c in cells}) == 4


def test_a_fleet_of_ray(root: Path, bench: Bench, pairs: list[Row], tmp_path: Path):
    """The recipe, with two actors that have a core instead of a GPU each."""
    bench.rows(pairs[:3])
    base = make_base(tmp_path / "base")
    host = current_host()
    command = [sys.executable, str(root / "recipes" / "ray_fleet.py"), "--comfyui", str(host.tree), "--servers", "2"]
    command += ["--gpus-each", "0", "--output", str(tmp_path / "out"), "--flags", f"--cpu --base-directory {base}"]
    command += ["--", "run", str(bench.workflow), "--table", str(bench.table), "--results", str(tmp_path / "results")]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = bench.cells()
    assert [c["status"] for c in cells] == ["done"] * 3
    assert len({c["server"] for c in cells}) == 2


# --- again ---------------------------------------------------------------------------------------------------------


def again(root: Path, file: Path, server: ComfyServer) -> tuple[int, str]:
    command = [sys.executable, "-m", "ziplora_batch", "again", str(file), "--server", server.url]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def test_a_result_is_made_again_from_its_own_file(
    root: Path, server: ComfyServer, content: Concept, style: Concept, tmp_path: Path
):
    name = server.put_lora(server.base / "models" / "loras" / content.lora, "to_be_replaced.safetensors")
    mine = Concept(name, content.prompt, content.picture)
    graph = zipped_picture(mine, style, steps=2, seed=77)
    graph["keep"] = node("SaveZippedLoRA", zipped_lora=["dial", 0], filename_prefix="again/zip")
    graph["export"] = node(
        "ExportMergedLoRA",
        zipped_lora=["dial", 0],
        filename_prefix="again/whole",
        rank=0,
        dtype="fp16",
        format="kohya",
    )
    result = server.run(graph)
    files = [*result.files("save"), *result.files("keep", "files"), *result.files("export", "files")]
    assert [f.suffix for f in files] == [".png", ".safetensors", ".safetensors"]
    for file in files:
        status, said = again(root, file, server)
        assert status == 0 and "the same, bit for bit" in said, said
        made = said.rpartition(" ")[2].strip()
        assert made != file.name, "compared with itself"
    spoiled = load_file(server.base / "models" / "loras" / name)
    save_file({k: v if "alpha" in k else v * 0.5 for k, v in spoiled.items()}, tmp_path / "new")
    server.put_lora(tmp_path / "new", name)
    for file in files:
        status, said = again(root, file, server)
        assert status == 1, said
        if file.suffix == ".safetensors":
            assert f"the content LoRA '{name}' is another file now" in said, said


def test_what_carries_no_workflow_is_named(root: Path, server: ComfyServer, content: Concept):
    result = server.run(picture(["checkpoint", 0], "a star"))
    bare = server.base / "bare.png"
    Image.open(result.files("save")[0]).save(bare)
    status, said = again(root, bare, server)
    assert status == 2 and "carries no workflow" in said
    status, said = again(root, server.base / "models" / "loras" / content.lora, server)
    assert status == 2 and "carries no workflow" in said
