"""The batch client against a bad network, and against its own death: light rows on one real server.

    python3 dev.py run benchmarks/batch.py network [--rows 500]
    python3 dev.py run benchmarks/batch.py kills [--times 50]

network: a proxy cuts every websocket each 5 s and fails one request in twenty, in turn in every way it knows.
kills: the client is ended by SIGKILL at random moments, started again each time, and in the end runs to its end.
Both then look whether every row is done once, drawn once, and there with its own hash. The short forms are tests.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: `nodes` there would hide ComfyUI's module

from devhost.base import make_base
from devhost.batches import kills, network
from devhost.server import ComfyServer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("network", "kills"))
    parser.add_argument("--rows", type=int, help="default: 500, or 20 for each kill")
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ComfyServer(make_base(Path(folder) / "base")) as server:
        if given.what == "network":
            print(network(server, Path(folder) / "network", given.rows or 500))
        else:
            print(kills(server, Path(folder) / "kills", given.times, given.rows, given.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
