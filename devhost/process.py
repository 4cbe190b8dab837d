"""A ComfyUI server as a subprocess on a base directory: started, looked after, ended. Nothing here imports ComfyUI."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import requests

from . import required
from .host import THREADS, current_host, named_frontend
from .listener import Listener

if TYPE_CHECKING:
    from typing import Self

# Flags of ComfyUI that exclude --cpu and each other.
DEVICE_FLAGS = {"--cpu", "--gpu-only", "--highvram", "--normalvram", "--lowvram", "--novram"}
PORT_TRIES = 5
PORT_TAKEN = "address already in use"


class ServerDied(RuntimeError):
    """The server's process ended, or never answered; the message ends with its log's last lines."""


@dataclass
class ComfyProcess:
    """One ComfyUI process on a base directory. A context manager; `start` and `stop` do the same by hand.

    `flags` are ComfyUI's own. `--cpu` is added unless they choose a device or `device` is "auto".
    """

    base: Path
    flags: Sequence[str] = ()
    device: str = "cpu"
    environment: dict[str, str] = field(default_factory=dict)
    start_timeout: float = 180.0

    process: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)
    listener: Listener | None = field(default=None, init=False, repr=False)
    port: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.base = Path(self.base)
        self.client_id = uuid.uuid4().hex
        self.session = requests.Session()
        self.session.trust_env = False  # a proxy setting must not catch the way to this machine

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *details: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log_file(self) -> Path:
        return self.base / "server.log"

    def command(self) -> list[str]:
        """The command line that starts ComfyUI."""
        command = [sys.executable, "-u", str(current_host().tree / "main.py")]
        command += ["--port", str(self.port), "--base-directory", str(self.base), "--disable-auto-launch"]
        command += ["--database-url", f"sqlite:///{(self.base / 'user' / 'comfyui.db').as_posix()}"]
        command += ["--disable-api-nodes"]  # with them the frontend asks other machines for things
        if self.device == "cpu" and not DEVICE_FLAGS & set(self.flags):
            command += ["--cpu"]
        if frontend := named_frontend():
            command += ["--front-end-root", str(frontend)]
        return command + list(self.flags)

    def start(self) -> Self:
        """Start the process, wait until it answers, connect the websocket. ServerDied with the log's tail if not.

        A port that was free may be taken before the host binds it, seconds later: then another one is tried, unless the
        caller has set `port`.
        """
        for tries_left in reversed(range(1 if self.port else PORT_TRIES)):
            self.port = self.port or free_port()
            try:
                self.launch()
                self.wait_until_ready()
                self.listener = Listener(f"ws://127.0.0.1:{self.port}/ws?clientId={self.client_id}")
                return self
            except BaseException as error:
                self.stop()
                if not (tries_left and isinstance(error, ServerDied) and PORT_TAKEN in str(error).lower()):
                    raise
        raise AssertionError("the last try returns or raises")

    def launch(self) -> None:
        """Start the process on `port`."""
        # Zips are not remembered on disk, unless a caller wants it: who runs one twice wants it computed twice.
        ours = {**THREADS, "ZIPLORA_REMEMBER_MB": "0"}
        # Nothing else on PYTHONPATH: with the pack on it, the folder `nodes` would hide ComfyUI's module of that name.
        environment = {**ours, **os.environ, "DO_NOT_TRACK": "1", **self.environment, **required.environment()}
        with open(self.log_file, "ab") as log:
            self.process = subprocess.Popen(
                self.command(), cwd=self.base, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.start_timeout
        while time.monotonic() < deadline:
            self.check_alive()
            try:
                if self.session.get(f"{self.url}/system_stats", timeout=5).ok and self.is_listening():
                    return
            except requests.RequestException:
                pass
            time.sleep(0.1)
        raise ServerDied(f"ComfyUI did not answer within {self.start_timeout:.0f} s.\n{self.log_tail()}")

    def is_listening(self) -> bool:
        """Whether it is this process that answers at `port`, and not another server that was there first."""
        import psutil

        try:
            connections = psutil.Process(self.check_alive().pid).net_connections("inet")
        except psutil.NoSuchProcess:
            return False
        return any(c.status == psutil.CONN_LISTEN and c.laddr.port == self.port for c in connections)

    def check_alive(self) -> subprocess.Popen[bytes]:
        """The process; ServerDied where it has ended."""
        if self.process is None:
            raise ServerDied("The server was not started.")
        if self.process.poll() is not None:
            raise ServerDied(f"ComfyUI ended with status {self.process.returncode}.\n{self.log_tail()}")
        return self.process

    def log(self) -> str:
        """All that the server has written."""
        return self.log_file.read_text(encoding="utf-8", errors="replace") if self.log_file.is_file() else ""

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log().splitlines()[-lines:])

    def stop(self, patience: float = 10.0) -> None:
        """End the process: politely, then not."""
        if self.listener is not None:
            self.listener.close()
            self.listener = None
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(patience)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process = None
        self.port = 0

    def memory(self) -> int:
        """Bytes that the process holds now (resident)."""
        import psutil

        return int(psutil.Process(self.check_alive().pid).memory_info().rss)

    def work(self) -> float:
        """Seconds of processor time that the process has used: what it does takes as many on a busy machine."""
        import psutil

        used = psutil.Process(self.check_alive().pid).cpu_times()
        return float(used.user + used.system)


def free_port() -> int:
    """A port that nothing listens on now.

    It lies below those that systems give to outgoing connections, for a server takes seconds to come and take it. The
    numbers are the system's, so that processes with one seed do not all choose the same.
    """
    chance = random.SystemRandom()
    while True:
        port = chance.randrange(20_000, 32_000)
        with socket.socket() as probe:
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port


def has_gpu() -> bool:
    """True where ComfyUI would find a device other than the CPU. A torch that finds none needs --cpu."""
    import torch

    return bool(torch.cuda.is_available() or torch.backends.mps.is_available())
