"""A ComfyUI server as a subprocess, and a client for it. Nothing here imports ComfyUI.

    with ComfyServer(base) as server:
        result = server.run(prompt)
        result.images("9")[0]        # uint8 array, height x width x 3

`python -m devhost.server --base DIR` runs one by hand in the foreground.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import requests
import websocket
from PIL import Image

from .install import THREADS, current_host

# Flags of ComfyUI that exclude --cpu and each other.
DEVICE_FLAGS = {"--cpu", "--gpu-only", "--highvram", "--normalvram", "--lowvram", "--novram"}
PREVIEW_FRAMES = {1, 2, 4}  # binary websocket messages that carry a preview picture
PORT_TRIES = 5
PORT_TAKEN = "address already in use"
TEXT_FRAME = 3  # one that carries text to be shown on a node

Prompt = dict[str, dict[str, Any]]


class ServerDied(RuntimeError):
    """The server's process ended, or never answered; the message ends with its log's last lines."""


class PromptRefused(ValueError):
    """The server did not accept a prompt. `node_errors` and `error` are its own words."""

    def __init__(self, answer: dict[str, Any]):
        self.error: dict[str, Any] = answer.get("error") or {}
        self.node_errors: dict[str, Any] = answer.get("node_errors") or {}
        super().__init__(f"The server refused the prompt: {json.dumps(answer)[:2000]}")

    def messages(self, node: str | int) -> str:
        """All that the server says about one node, in one string."""
        errors = self.node_errors.get(str(node), {}).get("errors", [])
        return "; ".join(f"{error['message']}: {error['details']}" for error in errors)


class ExecutionFailed(RuntimeError):
    """A node raised. `node`, `kind` and `text` say which, the exception's type and its message."""

    def __init__(self, result: Result):
        error = result.error or {}
        self.result = result
        self.node = str(error.get("node_id"))
        self.node_type = error.get("node_type", "")
        self.kind = error.get("exception_type", "")
        self.text = str(error.get("exception_message", "")).strip()
        trace = "".join(error.get("traceback") or [])
        super().__init__(f"Node {self.node} ({self.node_type}) raised {self.kind}: {self.text}\n{trace}")


class Interrupted(RuntimeError):
    """The prompt was interrupted."""


@dataclass(frozen=True)
class Event:
    """One websocket message: its type, its data, and the time.monotonic() of its arrival."""

    type: str
    data: dict[str, Any]
    time: float


@dataclass
class Result:
    """What one prompt left: the history entry, the websocket's events, and the seconds it took."""

    server: ComfyServer
    prompt_id: str
    history: dict[str, Any]
    events: list[Event]
    seconds: float

    @property
    def status(self) -> str:
        """`success` or `error` (an interrupt is an error too: see `interrupted`)."""
        return str(self.history["status"]["status_str"])

    @property
    def outputs(self) -> dict[str, Any]:
        return dict(self.history["outputs"])

    def message(self, kind: str) -> dict[str, Any] | None:
        """Data of the first status message of a kind, such as `execution_error`."""
        return next((data for name, data in self.history["status"]["messages"] if name == kind), None)

    @property
    def error(self) -> dict[str, Any] | None:
        return self.message("execution_error")

    @property
    def interrupted(self) -> bool:
        return self.message("execution_interrupted") is not None

    @property
    def cached(self) -> set[str]:
        """Ids of the nodes that the server did not run again."""
        return set((self.message("execution_cached") or {"nodes": []})["nodes"])

    @property
    def executed(self) -> list[str]:
        """Ids of the nodes that ran, in order."""
        nodes = (event.data.get("node") for event in self.events if event.type == "executing")
        return [str(node) for node in nodes if node is not None]

    def progress(self, node: str | int) -> list[tuple[int, int]]:
        """(value, maximum) of every progress event of a node."""
        return [
            (event.data["value"], event.data["max"])
            for event in self.events
            if event.type == "progress" and str(event.data.get("node")) == str(node)
        ]

    def said(self, node: str | int) -> list[str]:
        """Every text that was shown on a node while it ran, in order."""
        return [e.data["text"] for e in self.events if e.type == "progress_text" and e.data["node"] == str(node)]

    @property
    def previews(self) -> int:
        """Number of preview pictures that came over the websocket."""
        return sum(event.type == "preview" for event in self.events)

    def text(self, node: str | int) -> str:
        """Text that a node shows (PreviewAny and its like)."""
        return "\n".join(map(str, self.outputs.get(str(node), {}).get("text", [])))

    def files(self, node: str | int, kind: str = "images") -> list[Path]:
        """Paths of the files that a node wrote."""
        return [self.server.path_of(entry) for entry in self.outputs.get(str(node), {}).get(kind, [])]

    def images(self, node: str | int) -> list[np.ndarray]:
        """Pictures that a node showed or saved: uint8, height x width x 3."""
        return [self.server.view(entry) for entry in self.outputs.get(str(node), {}).get("images", [])]


class Listener:
    """Collects the websocket's messages in a thread."""

    def __init__(self, url: str):
        self.events: list[Event] = []
        self.changed = threading.Condition()
        self.socket = websocket.create_connection(url, timeout=30)
        self.socket.settimeout(None)
        self.thread = threading.Thread(target=self.listen, daemon=True)
        self.thread.start()

    def listen(self) -> None:
        while True:
            try:
                message = self.socket.recv()
            except (websocket.WebSocketException, OSError):
                return
            if not message:
                return
            if isinstance(message, str):
                parsed = json.loads(message)
                event = Event(parsed["type"], parsed.get("data") or {}, time.monotonic())
            else:
                number = int.from_bytes(message[:4], "big")
                said = {}
                if number == TEXT_FRAME:
                    end = 8 + int.from_bytes(message[4:8], "big")
                    said = {"node": message[8:end].decode(), "text": message[end:].decode()}
                kind = "progress_text" if said else "preview" if number in PREVIEW_FRAMES else "binary"
                event = Event(kind, {"number": number, "bytes": len(message), **said}, time.monotonic())
            with self.changed:
                self.events.append(event)
                self.changed.notify_all()

    def wait_for(self, wanted: Callable[[Event], bool], timeout: float, start: int = 0) -> Event | None:
        """First event from index `start` on that `wanted` accepts; None after `timeout` seconds."""
        with self.changed:
            found: list[Event] = []

            def look() -> bool:
                found[:] = [event for event in self.events[start:] if wanted(event)][:1]
                return bool(found)

            self.changed.wait_for(look, timeout)
            return found[0] if found else None

    def close(self) -> None:
        self.socket.close()


@dataclass
class ComfyServer:
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

    def __enter__(self) -> ComfyServer:
        return self.start()

    def __exit__(self, *details: object) -> None:
        self.stop()

    # The process

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
        return command + list(self.flags)

    def start(self) -> ComfyServer:
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
        environment = {**THREADS, **os.environ, "DO_NOT_TRACK": "1", **self.environment}
        environment.pop("PYTHONPATH", None)  # the pack's folder `nodes` would hide ComfyUI's module of that name
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

    # Requests

    def get(self, path: str, **parameters: Any) -> Any:
        """JSON answer of a GET request."""
        answer = self.session.get(f"{self.url}/{path}", params=parameters, timeout=60)
        answer.raise_for_status()
        return answer.json()

    def post(self, path: str, body: dict[str, Any] | None = None) -> requests.Response:
        return self.session.post(f"{self.url}/{path}", json=body or {}, timeout=60)

    def object_info(self, node: str | None = None) -> dict[str, Any]:
        """The server's description of one node type, or of all by id."""
        found: dict[str, Any] = self.get("object_info" if node is None else f"object_info/{node}")
        return found if node is None else found[node]

    def queue(self, prompt: Prompt, **extra: Any) -> str:
        """Queue a prompt in API format and return its id; PromptRefused where validation fails."""
        self.check_alive()
        answer = self.post("prompt", {"prompt": prompt, "client_id": self.client_id, **extra})
        body = answer.json()
        if not answer.ok or body.get("node_errors"):
            raise PromptRefused(body)
        return str(body["prompt_id"])

    def wait(self, prompt_id: str, timeout: float = 600.0) -> dict[str, Any]:
        """The history entry of a prompt, once it has ended."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            self.check_alive()
            history: dict[str, Any] = self.get(f"history/{prompt_id}")
            if prompt_id in history:
                return dict(history[prompt_id])
            time.sleep(0.05)
        raise TimeoutError(f"Prompt {prompt_id} did not end within {timeout:.0f} s.\n{self.log_tail()}")

    def finish(self, prompt_id: str, timeout: float = 600.0, started: float | None = None) -> Result:
        """Wait for a queued prompt and gather its history and its events; raises nothing about its outcome."""
        start = time.monotonic() if started is None else started
        history = self.wait(prompt_id, timeout)
        seconds = time.monotonic() - start

        def ended(event: Event) -> bool:
            here = event.data.get("prompt_id") == prompt_id
            return here and event.type == "executing" and event.data.get("node") is None

        # The websocket's last word about a prompt comes after its history entry.
        if self.connection.wait_for(ended, 60.0) is None:
            raise TimeoutError(f"The websocket never said that prompt {prompt_id} had ended.")
        return Result(self, prompt_id, history, self.events(prompt_id), seconds)

    def run(self, prompt: Prompt, timeout: float = 600.0, check: bool = True) -> Result:
        """Queue a prompt and wait. With `check`, ExecutionFailed or Interrupted unless it succeeded."""
        start = time.monotonic()
        result = self.finish(self.queue(prompt), timeout, start)
        if check and result.interrupted:
            raise Interrupted(f"Prompt {result.prompt_id} was interrupted.")
        if check and result.status != "success":
            raise ExecutionFailed(result)
        return result

    @property
    def connection(self) -> Listener:
        if self.listener is None:
            raise ServerDied("The server was not started.")
        return self.listener

    def events(self, prompt_id: str) -> list[Event]:
        """Events of one prompt. Preview pictures name none, so those between its first and last event count."""
        with self.connection.changed:
            events = list(self.connection.events)
        own = [index for index, event in enumerate(events) if event.data.get("prompt_id") == prompt_id]
        if not own:
            return []
        between = events[own[0] : own[-1] + 1]
        return [event for event in between if event.data.get("prompt_id", prompt_id) == prompt_id]

    def wait_for_text(self, prompt_id: str, node: str | int, start: str, timeout: float = 300.0) -> Event:
        """The event in which a node shows a text that begins so. The prompt is the one that runs, or will run next."""

        def shown(event: Event) -> bool:
            here = event.type == "progress_text" and event.data["node"] == str(node)
            return here and event.data["text"].startswith(start)

        with self.connection.changed:
            of_prompt = (i for i, e in enumerate(self.connection.events) if e.data.get("prompt_id") == prompt_id)
            first = next(of_prompt, len(self.connection.events))
        event = self.connection.wait_for(shown, timeout, first)
        if event is None:
            raise TimeoutError(f"Node {node} did not say '{start}…' within {timeout:.0f} s.\n{self.log_tail()}")
        return event

    def interrupt(self) -> None:
        """Interrupt what runs."""
        self.post("interrupt").raise_for_status()

    def free(self) -> None:
        """Unload every model and forget every cached output."""
        self.post("free", {"unload_models": True, "free_memory": True}).raise_for_status()

    # Files

    def path_of(self, entry: dict[str, str]) -> Path:
        """Path of a file that an output names by folder type, subfolder and filename."""
        return self.base / entry.get("type", "output") / entry.get("subfolder", "") / entry["filename"]

    def view(self, entry: dict[str, str]) -> np.ndarray:
        """A picture that an output names: uint8, height x width x 3."""
        answer = self.session.get(f"{self.url}/view", params=entry, timeout=60)
        answer.raise_for_status()
        return np.asarray(Image.open(io.BytesIO(answer.content)).convert("RGB"))

    def upload(self, picture: Path | np.ndarray, name: str) -> str:
        """Put a picture (a file, or uint8 height x width x 3) into the input folder; returns the name to load."""
        if isinstance(picture, np.ndarray):
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, "png")
            content = buffer.getvalue()
        else:
            content = Path(picture).read_bytes()
        files = {"image": (name, content, "image/png")}
        answer = self.session.post(f"{self.url}/upload/image", files=files, data={"overwrite": "true"}, timeout=60)
        answer.raise_for_status()
        return str(answer.json()["name"])

    def put_lora(self, source: Path, name: str | None = None) -> str:
        """Copy a file into the LoRA folder (a copy, so that a test may change it); returns the name to load."""
        return self.put("loras", source, name)

    def put(self, kind: str, source: Path, name: str | None = None) -> str:
        target = self.base / "models" / kind / (name or Path(source).name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # it may be a link to a shipped file, which must stay as it is
        shutil.copyfile(source, target)
        return target.name if name is None else name


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


def main() -> int:
    """Run ComfyUI in the foreground; arguments that we do not know are ComfyUI's."""
    parser = argparse.ArgumentParser(description="ComfyUI on a base directory of ours.")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--port", type=int, default=8188)
    given, flags = parser.parse_known_args()
    server = ComfyServer(given.base, flags, device="auto" if has_gpu() else "cpu")
    server.port = given.port
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    try:
        return subprocess.run(server.command(), cwd=given.base, env=environment).returncode
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
