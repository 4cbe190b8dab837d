"""A batch over a fleet: Ray places one ComfyUI server on each GPU and keeps it alive; the batch uses their queues.

python recipes/ray_fleet.py --comfyui DIR --servers 8 -- run WORKFLOW --table pairs.csv --results results

What stands after `--` is `python -m ziplora_batch`'s own, without --server. On a cluster: `ray start` on each machine
first, ComfyUI in the same place on all of them, LoRAs on a shared disk. Needs `pip install ray`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import ray

sys.path.append(str(Path(__file__).resolve().parent.parent))

from ziplora_batch.__main__ import main as batch


@ray.remote(max_restarts=-1)
class ComfyUI:
    """One server, on the GPU that Ray gave this actor (Ray sets CUDA_VISIBLE_DEVICES, which the server inherits).

    Its temporary files, output and database are its own, since servers of one folder would overwrite each other's.
    """

    def __init__(self, tree: str, python: str, output: str, flags: list[str]):
        self.place = ray.util.get_node_ip_address()
        with socket.socket() as free:
            free.bind(("", 0))
            self.port = free.getsockname()[1]
        temporary = tempfile.mkdtemp(prefix="comfyui")
        self.command = [python, f"{tree}/main.py", "--listen", self.place, "--port", str(self.port)]
        self.command += ["--temp-directory", temporary, "--database-url", f"sqlite:///{temporary}/comfyui.db"]
        self.command += ["--output-directory", output, "--disable-auto-launch", *flags]
        self.log = open(f"{temporary}/server.log", "ab")
        self.stopped = False
        self.start()
        threading.Thread(target=self.keep, daemon=True).start()

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stdout=self.log, stderr=self.log)

    def keep(self) -> None:
        """Start it again on the same port when it dies: the batch waits there."""
        while True:
            self.process.wait()
            if self.stopped:
                return
            self.start()

    def address(self) -> str:
        """Once it answers."""
        url = f"http://{self.place}:{self.port}"
        while True:
            try:
                urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{url}/queue", timeout=5).close()
                return url
            except OSError:
                time.sleep(0.5)

    def pid(self) -> int:
        return self.process.pid

    def stop(self) -> None:
        self.stopped = True
        self.process.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", required=True, help="a ComfyUI tree, in the same place on every machine")
    parser.add_argument("--python", default=sys.executable, help="the Python that runs it")
    parser.add_argument("--servers", type=int, default=1, help="how many, one on each GPU")
    parser.add_argument("--gpus-each", type=float, default=1.0)
    parser.add_argument("--output", type=Path, default=Path("output"), help="a folder in which each server has its own")
    parser.add_argument("--flags", default="", help="more of ComfyUI's own, e.g. '--lowvram'")
    parser.add_argument("batch", nargs=argparse.REMAINDER, help="-- run WORKFLOW --table pairs.csv --results results")
    asked = parser.parse_args()
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own 15 is for work in the background
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    placed = ComfyUI.options(num_gpus=asked.gpus_each)
    output = asked.output.resolve()
    servers = [
        placed.remote(asked.comfyui, asked.python, str(output / f"server{number}"), shlex.split(asked.flags))
        for number in range(asked.servers)
    ]
    try:
        addresses = ray.get([server.address.remote() for server in servers])
        print("servers:", *addresses, flush=True)
        return batch([*asked.batch[1:], *(word for url in addresses for word in ("--server", url))])
    finally:
        ray.get([server.stop.remote() for server in servers])
        ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
