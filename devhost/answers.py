"""What a ComfyUI server says of a prompt: events, results, and why it was refused or failed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

Prompt = dict[str, dict[str, Any]]


class Files(Protocol):
    """Where what an output names can be had: a server."""

    def path_of(self, entry: dict[str, str]) -> Path: ...

    def view(self, entry: dict[str, str]) -> np.ndarray: ...


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

    server: Files
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
