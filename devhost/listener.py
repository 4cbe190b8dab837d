"""The websocket of a ComfyUI server, listened to in a thread."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable

import websocket

from .answers import Event

PREVIEW_FRAMES = {1, 2, 4}  # binary messages that carry a preview picture
TEXT_FRAME = 3  # one that carries text to be shown on a node


class Listener:
    """Collects the messages of a websocket as events."""

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
