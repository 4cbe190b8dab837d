"""A batch over a fleet: Ray places one ComfyUI server on each GPU and keeps it alive; the batch uses their queues.

python recipes/ray_fleet.py --comfyui DIR --servers 8 -- run WORKFLOW --table pairs.csv --results results

What stands after `--` is `python -m ziplora_batch`'s own, without --server. Needs `pip install ray`.

On one machine the servers listen on 127.0.0.1, where only that machine's users reach them. On a cluster (`ray start` on
each machine first, ComfyUI in the same place on all of them, LoRAs on a shared disk) give --expose: each server then
listens on its machine's own address, without a password, and whoever reaches that port can run any workflow there and
read what it made. Do so only in a network that is closed to others.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

sys.path.append(str(Path(__file__).resolve().parent.parent))

from ziplora_batch.__main__ import main as batch

PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0, 60.0)  # seconds before a server is started once more
NEVER_ANSWERED = 2  # restarts of a server that has not answered yet: what it lacks will not come by itself
STEADY = 60.0  # seconds of answering after which a server's earlier deaths count no more
PATIENCE = 600.0  # seconds that a server may take to answer first
_STOPPING = 10.0  # seconds
_LOOKING = 60.0  # seconds that an actor, which never waits, may take to say how its server is
_PR_SET_PDEATHSIG = 1  # of Linux: the signal for a process when its parent ends


class FleetError(RuntimeError):
    """The fleet cannot start: what is wrong, and where it is written."""


@dataclass(frozen=True)
class State:
    """Of one server. failed: why it is started no more. host: the machine that `log` and `pid` are on."""

    url: str
    ready: bool
    failed: str
    log: str
    pid: int
    host: str


class Server:
    """One ComfyUI, on the GPU that Ray gave this actor (Ray sets CUDA_VISIBLE_DEVICES, which the server inherits).

    Its temporary files, output and database are its own, since servers of one folder would overwrite each other's.
    When it dies it is started again on the same port, where the batch waits for it: after a growing pause, and not for
    good. No method waits, so `stop` is always heard.
    """

    def __init__(
        self,
        tree: str,
        python: str,
        output: str,
        flags: list[str],
        place: str | None = "127.0.0.1",
        patience: float = PATIENCE,
        pauses: tuple[float, ...] = PAUSES,
    ):
        """place: the address to listen on; None for this machine's own."""
        self.place = place or ray.util.get_node_ip_address()
        self.port = 0
        temporary = tempfile.mkdtemp(prefix="comfyui")
        self.log = f"{temporary}/server.log"
        self.command = [python, f"{tree}/main.py", "--temp-directory", temporary, "--output-directory", output]
        self.command += ["--database-url", f"sqlite:///{temporary}/comfyui.db", "--disable-auto-launch", *flags]
        self.patience, self.pauses = patience, pauses
        self.answered_at: float | None = None
        self.ever = False
        self.failed = ""
        self.process: subprocess.Popen[bytes] | None = None
        self.stopped = threading.Event()
        self.starting = threading.Lock()
        threading.Thread(target=self._keep, daemon=True).start()

    def state(self) -> State:
        process, url = self.process, f"http://{self.place}:{self.port}"
        pid = 0 if process is None else process.pid
        return State(url, self.answered_at is not None, self.failed, self.log, pid, socket.gethostname())

    def stop(self) -> None:
        with self.starting:
            self.stopped.set()
            if self.process is not None:
                self.process.kill()

    def _keep(self) -> None:
        try:
            self._restart()
        except (OSError, subprocess.SubprocessError) as error:  # no such Python, no room for a log
            self.failed = f"cannot be started: {error}"

    def _restart(self) -> None:
        deaths = 0
        while True:
            with self.starting:
                if self.stopped.is_set():
                    return
                self.process = self._start()
            late = not self._wait_until_it_answers(self.process)
            status = self.process.wait()
            answered, self.answered_at = self.answered_at, None
            if self.stopped.is_set():
                return
            steady = answered is not None and time.monotonic() - answered >= STEADY
            deaths = 1 if steady else deaths + 1
            if deaths > (len(self.pauses) if self.ever else min(NEVER_ANSWERED, len(self.pauses))):
                why = f"did not answer within {self.patience:g} s" if late else f"ended with status {status}"
                self.failed = f"{why}, {deaths} times in a row; {self._last_words()}"
                return
            if self.stopped.wait(self.pauses[deaths - 1]):
                return

    def _start(self) -> subprocess.Popen[bytes]:
        if not self.ever:  # a port may have been taken meanwhile; later it stays, since the batch knows it
            with socket.socket() as free:
                free.bind((self.place, 0))
                self.port = free.getsockname()[1]
        with open(self.log, "ab") as log:
            command = [*self.command, "--listen", self.place, "--port", str(self.port)]
            return subprocess.Popen(  # of a session of its own: Ctrl-C is not for it
                command, stdout=log, stderr=log, start_new_session=True, preexec_fn=_end_with(os.getpid())
            )

    def _wait_until_it_answers(self, process: subprocess.Popen[bytes]) -> bool:
        """Or ends, or takes too long and is ended: False."""
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        end = time.monotonic() + self.patience
        while process.poll() is None:
            try:
                direct.open(f"http://{self.place}:{self.port}/queue", timeout=5).close()
                self.answered_at, self.ever = time.monotonic(), True
                return True
            except (OSError, ValueError):
                if time.monotonic() > end:
                    process.kill()
                    return False
                time.sleep(0.2)
        return True

    def _last_words(self) -> str:
        text = Path(self.log).read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return f"last in its log: {lines[-1][:300]}" if lines else "its log is empty"


def _end_with(parent: int) -> Callable[[], None] | None:
    """For a new process: to be killed where the thread that starts it ends, however it ends; that is the one that keeps
    it, and outlives it where nothing goes wrong. Linux alone has that."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def end_with() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before
            os._exit(1)

    return end_with


def place(asked: argparse.Namespace) -> list[Any]:
    """An actor for each server; without --expose on this machine alone."""
    where = {}
    if not asked.expose:
        here = ray.get_runtime_context().get_node_id()
        where = {"scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False)}
    # Ray's own restarts of an actor would give it another address, which the batch would not know.
    actor = ray.remote(Server).options(num_gpus=asked.gpus_each, max_restarts=0, **where)
    output, flags = asked.output.resolve(), shlex.split(asked.flags)
    address = None if asked.expose else "127.0.0.1"
    return [
        actor.remote(asked.comfyui, asked.python, str(output / f"server{n}"), flags, address, asked.patience)
        for n in range(asked.servers)
    ]


def wait(servers: list[Any], patience: float, exposed: bool) -> list[str]:
    """Addresses, once all answer. Raises FleetError with the first that cannot start, and where its log is."""
    asking = [server.state.remote() for server in servers]
    placed, missing = ray.wait(asking, num_returns=len(servers), timeout=patience)
    if missing:
        raise FleetError(
            f"Ray could place {len(placed)} of {len(servers)} servers within {patience:g} s; see `ray status` for what "
            "it waits for, ask for fewer --servers or a smaller --gpus-each"
            + ("" if exposed else ", or let --expose use the cluster's other machines")
        )
    said: set[int] = set()
    # What the servers themselves may take, with all of their restarts, and some more.
    longest = (NEVER_ANSWERED + 1) * patience + sum(PAUSES[:NEVER_ANSWERED]) + _LOOKING
    end = time.monotonic() + longest
    while True:
        states = look(servers)
        for number, state in enumerate(states):
            if isinstance(state, str):
                raise FleetError(f"server {number} {state}")
            if state.failed:
                raise FleetError(f"server {number} {state.failed}\nits log: {_log(state)}")
            if number not in said:
                print(f"server {number} starts; its log: {_log(state)}", flush=True)
                said.add(number)
        found = [state.url for state in states if isinstance(state, State) and state.ready]
        if len(found) == len(servers):
            return found
        if time.monotonic() > end:
            raise FleetError(f"{len(found)} of {len(servers)} servers answer after {longest:g} s; see their logs above")
        time.sleep(0.2)


def look(servers: list[Any]) -> list[State | str]:
    """How each server is; in words where its actor does not say."""
    asking = [server.state.remote() for server in servers]
    ray.wait(asking, num_returns=len(asking), timeout=_LOOKING)
    found: list[State | str] = []
    for asked in asking:
        try:
            found.append(ray.get(asked, timeout=0))
        except ray.exceptions.GetTimeoutError:
            found.append(f"does not say how it is: its actor has not answered for {_LOOKING:g} s")
        except ray.exceptions.RayError as error:
            words = str(error).strip().splitlines() or [""]
            found.append(f"is gone with its actor, which was killed or whose machine is gone: {words[0]}")
    return found


def _log(state: State) -> str:
    return state.log if state.host == socket.gethostname() else f"{state.log} on {state.host}"


def stop(servers: list[Any]) -> None:
    """All at once; one that Ray has not placed yet is not waited for."""
    ray.wait([server.stop.remote() for server in servers], num_returns=len(servers), timeout=_STOPPING)


def run(asked: argparse.Namespace) -> int:
    if not (Path(asked.comfyui) / "main.py").is_file():
        raise FleetError(f"there is no ComfyUI in {asked.comfyui}: it has no main.py")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own 15 is for work in the background
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    servers: list[Any] = []
    try:
        servers = place(asked)
        addresses = wait(servers, asked.patience, asked.expose)
        print("servers:", *addresses, flush=True)
        status = batch([*asked.batch[1:], *(word for url in addresses for word in ("--server", url))])
        for number, state in enumerate(look(servers)):
            if isinstance(state, str):
                print(f"server {number} {state}", file=sys.stderr)
            elif state.failed:
                print(f"server {number} {state.failed}\nits log: {_log(state)}", file=sys.stderr)
        return status
    finally:
        stop(servers)
        ray.shutdown()


def main() -> int:
    """As `python -m ziplora_batch`; 2 too where the fleet cannot start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", required=True, help="a ComfyUI tree, in the same place on every machine")
    parser.add_argument("--python", default=sys.executable, help="the Python that runs it")
    parser.add_argument("--servers", type=int, default=1, help="how many, one on each GPU")
    parser.add_argument("--gpus-each", type=float, default=1.0)
    parser.add_argument("--output", type=Path, default=Path("output"), help="a folder in which each server has its own")
    parser.add_argument("--flags", default="", help="more of ComfyUI's own, e.g. '--lowvram'")
    parser.add_argument(
        "--expose",
        action="store_true",
        help="use other machines too: servers listen to the network, without a password",
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=PATIENCE,
        help="seconds that a server may take to start (default: %(default)g)",
    )
    parser.add_argument("batch", nargs=argparse.REMAINDER, help="-- run WORKFLOW --table pairs.csv --results results")
    asked = parser.parse_args()
    try:
        return run(asked)
    except FleetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
