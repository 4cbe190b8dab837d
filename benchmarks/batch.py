"""The batch client against a bad network, and against its own death: light rows on one real server.

    python3 dev.py run benchmarks/batch.py network [--rows 500]
    python3 dev.py run benchmarks/batch.py kills [--times 50]

network: a proxy cuts every websocket each 5 s and fails one request in twenty, in turn in every way it knows.
kills: the client is ended by SIGKILL at random moments, started again each time, and in the end runs to its end.
Both then look whether every row is done once, drawn once, and there with its own hash. The short forms are tests.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: `nodes` there would hide ComfyUI's module

from devhost.base import make_base
from devhost.batches import LightBatch
from devhost.proxy import CUT, HALF, HTML, JSON, LATE, Proxy
from devhost.server import ComfyServer

FATES = (502, CUT, LATE, HALF, 429, HTML, 500, JSON, 404)


def one_in_twenty(request: Any, number: int) -> Any:
    """The rule of a proxy that fails each twentieth request, in turn in every way."""
    return FATES[number // 20 % len(FATES)] if number % 20 == 0 else None


def network(server: ComfyServer, folder: Path, rows: int, socket_seconds: float = 5.0) -> str:
    """Raises AssertionError where a row is not done once."""
    batch = LightBatch(folder, f"network{rows}", rows)
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
    rows = rows or times * 6
    batch = LightBatch(folder, f"kills{times}", rows)
    chance = random.Random(seed)
    done: list[int] = []
    began = time.monotonic()
    while len(done) < times:
        process = batch.start(server.url, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        lines = len(batch.lines())
        # From its first line on, so that most moments are those of its work and few those of its start.
        while chance.random() < 0.9 and len(batch.lines()) == lines and process.poll() is None:
            time.sleep(0.005)
        time.sleep(chance.uniform(0.0, 0.4))
        assert process.poll() is None, "all rows were done before the last kill; ask for more rows"
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("network", "kills"))
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ComfyServer(make_base(Path(folder) / "base")) as server:
        if given.what == "network":
            print(network(server, Path(folder) / "network", given.rows))
        else:
            print(kills(server, Path(folder) / "kills", given.times, seed=given.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
