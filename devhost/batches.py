"""Batches of rows that cost nothing, for what a network, a second client or a power cut does to them.

A row is a picture of one colour under a name of its own, so that a server's output folder and log say how often each
was drawn.
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
import subprocess
import sys
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .proxy import CUT, HALF, HTML, JSON, LATE, Proxy
from .server import ComfyServer

ROOT = Path(__file__).resolve().parent.parent
SIZE = 16


class LightBatch:
    """Rows for one client. gate: a file without which no row ends, for servers that have tests/gates."""

    def __init__(self, folder: Path, rows: int, gate: Path | None = None):
        self.folder, self.count = folder, rows
        self.mark = uuid.uuid4().hex[:8]  # tells this batch's pictures from others' on the same server
        self.results = folder / "results"
        folder.mkdir(parents=True, exist_ok=True)
        graph: dict[str, dict[str, Any]] = {
            "draw": {
                "class_type": "EmptyImage",
                "inputs": {"width": SIZE, "height": SIZE, "batch_size": 1, "color": 0},
            },
            "save": {"class_type": "SaveImage", "inputs": {"images": ["draw", 0], "filename_prefix": self.mark}},
        }
        if gate is not None:
            graph["gate"] = {"class_type": "WaitAtGate", "inputs": {"value": ["draw", 0], "gate": str(gate)}}
            graph["save"]["inputs"]["images"] = ["gate", 0]
        self.workflow, self.table = folder / "workflow.json", folder / "rows.jsonl"
        self.workflow.write_text(json.dumps(graph), encoding="utf-8")
        self.write([self.row(number) for number in range(rows)])

    def row(self, number: int) -> dict[str, Any]:
        return {"name": f"row {number}", "color": self.colour(number), "filename_prefix": f"{self.mark}/r{number}"}

    @staticmethod
    def colour(number: int) -> int:
        return (number * 7919 + 1) % (1 << 24)

    def write(self, rows: list[dict[str, Any]]) -> None:
        self.table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def command(self, *servers: str, more: tuple[str, ...] = ()) -> list[str]:
        command = [sys.executable, "-m", "ziplora_batch", "run", str(self.workflow), "--table", str(self.table)]
        addresses = [word for server in servers for word in ("--server", server)]
        return [*command, *addresses, "--results", str(self.results), *more]

    def start(self, *servers: str, more: tuple[str, ...] = (), **options: Any) -> subprocess.Popen[str]:
        return self.start_command(self.command(*servers, more=more), **options)

    def run(self, *servers: str, more: tuple[str, ...] = (), seconds: float = 300, **options: Any) -> tuple[int, str]:
        """(exit status, everything said)"""
        return self.run_command(self.command(*servers, more=more), seconds, **options)

    def start_command(self, command: list[str], **options: Any) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "encoding": "utf-8"}
        return subprocess.Popen(command, cwd=ROOT, **{**pipes, **options})

    def run_command(self, command: list[str], seconds: float = 300, **options: Any) -> tuple[int, str]:
        """(exit status, everything said)"""
        process = self.start_command(command, **options)
        said, _ = process.communicate(timeout=seconds)
        return process.returncode, said

    def lines(self) -> list[dict[str, Any]]:
        """results.jsonl; a line that is not finished yet is left out."""
        log = self.results / "results.jsonl"
        whole = log.read_bytes().rpartition(b"\n")[0] if log.is_file() else b""
        return [json.loads(line) for line in whole.split(b"\n") if line]

    def cells(self) -> list[dict[str, str]]:
        with (self.results / "results.csv").open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def drawn(self, server: ComfyServer) -> Counter[str]:
        """How many pictures of each row a server has in its output folder, by the row's file prefix."""
        found = (server.base / "output" / self.mark).glob("*.png")
        return Counter(path.name.partition("_")[0] for path in found)

    def kept(self) -> list[Path]:
        """The picture of each row, in the results folder."""
        return [self.results / cell["files"] for cell in self.cells()]

    def check(self, *servers: ComfyServer) -> None:
        """Every row done once, its picture there with its size, its hash and its colour; drawn once by all servers."""
        lines = self.lines()
        done = [line for line in lines if line["status"] == "done"]
        assert len({line["key"] for line in done}) == len(done) == self.count, Counter(x["status"] for x in lines)
        cells = self.cells()
        assert [cell["status"] for cell in cells] == ["done"] * self.count
        by_path = {picture["path"]: picture for line in done for picture in line["files"]}
        assert len(by_path) == self.count
        for number, cell in enumerate(cells):
            path = self.results / cell["files"]
            data = path.read_bytes()
            said = by_path[cell["files"]]
            assert (said["size"], said["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
            colour = int.from_bytes(np.asarray(Image.open(path).convert("RGB"))[0, 0].tobytes(), "big")
            assert colour == self.colour(number), cell
        drawn = sum((self.drawn(server) for server in servers), Counter())
        assert drawn == {f"r{number}": 1 for number in range(self.count)}, [x for x in drawn.items() if x[1] != 1]
        left = list(self.results.rglob("*.part"))
        assert not left, left


FATES = (502, CUT, LATE, HALF, 429, HTML, 500, JSON, 404)


def one_in_twenty(request: Any, number: int) -> Any:
    """The rule of a proxy that fails each twentieth request, in turn in every way."""
    return FATES[number // 20 % len(FATES)] if number % 20 == 0 else None


def network(server: ComfyServer, folder: Path, rows: int, socket_seconds: float = 5.0) -> str:
    """Raises AssertionError where a row is not done once."""
    batch = LightBatch(folder, rows)
    began = time.monotonic()
    with Proxy(server.url, one_in_twenty, socket_seconds) as proxy:
        proxy.retry_after = "0"
        status, said = batch.run(proxy.url, seconds=3600)
        seconds = time.monotonic() - began
    assert status == 0, said[-3000:]
    batch.check(server)
    kinds = Counter(line["status"] for line in batch.lines())
    return (
        f"{rows} rows in {seconds:.0f} s; {len(proxy.asked)} requests, {proxy.failed} failed by the proxy, "
        f"{proxy.sockets} websockets; lines {dict(kinds)}; every row done once, drawn once, hashes right"
    )


def kills(server: ComfyServer, folder: Path, times: int, rows: int | None = None, seed: int = 0) -> str:
    """Raises AssertionError where a row is lost, or done or drawn twice."""
    rows = rows or times * 20
    batch = LightBatch(folder, rows)
    chance = random.Random(seed)
    done: list[int] = []
    share = rows // (times + 2)
    began = time.monotonic()
    while len(done) < times:
        process = batch.start(server.url, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        lines = len(batch.lines())
        working = chance.random() < 0.9  # from its first line on: the moments of its start are many, and much alike
        while working and len(batch.lines()) == lines and process.poll() is None:
            time.sleep(0.005)
        until = time.monotonic() + chance.uniform(0.0, 0.4)
        while time.monotonic() < until and len(batch.lines()) < lines + share:  # of a fast server some rows stay
            time.sleep(0.005)
        if process.poll() is not None:
            raise RuntimeError("all rows were done before the last kill; ask for more rows")
        process.kill()
        process.wait()
        done.append(len(batch.lines()) - lines)
    status, said = batch.run(server.url, seconds=3600)
    assert status == 0, said[-3000:]
    batch.check(server)
    return (
        f"{times} kills, after {sum(done)} of {rows} rows, in {time.monotonic() - began:.0f} s; "
        "no row lost, none done or drawn twice, hashes right"
    )
