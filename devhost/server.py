"""A ComfyUI server as a subprocess, and a client for it. Nothing here imports ComfyUI.

    with ComfyServer(base) as server:
        result = server.run(prompt)
        result.images("9")[0]        # uint8 array, height x width x 3

`python -m devhost.server --base DIR` runs one by hand in the foreground.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import requests
from PIL import Image

from .answers import Event, ExecutionFailed, Interrupted, Prompt, PromptRefused, Result
from .listener import Listener
from .process import ComfyProcess, ServerDied, has_gpu


class ComfyServer(ComfyProcess):
    """What can be asked of the server: to run prompts, to tell of itself, to take and give files."""

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
