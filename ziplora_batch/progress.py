"""What a server says while it works, over its websocket: decoration, since a prompt's truth is in the history."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp

from .connection import Connection, ended, pause

Heard = Callable[[str, int, int], None]  # node id, value, maximum

_CLOSING = 3.0  # seconds that a connection may take to close
_TROUBLE = (aiohttp.ClientError, OSError, asyncio.TimeoutError, ValueError)


class Listener:
    """Hears of one prompt at a time. A connection that closes, or is never had, is tried again, and harms nothing."""

    def __init__(self, connection: Connection, client: str):
        self._connection = connection
        self._url = f"{connection.address.url}/ws?clientId={client}"
        self._prompt_id = ""
        self._heard: Heard = lambda node, value, end: None
        self._ended = asyncio.Event()

    def follow(self, prompt_id: str, heard: Heard) -> None:
        """Hear of this prompt from now on."""
        self._prompt_id, self._heard = prompt_id, heard
        self._ended.clear()

    async def until_ended(self, seconds: float) -> None:
        """Until the prompt is said to have ended, or for so long: it may have ended without being heard."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._ended.wait(), seconds)
        self._ended.clear()

    async def listen(self) -> None:
        """For good."""
        failed = 0
        while True:
            with contextlib.suppress(*_TROUBLE):
                timeout = aiohttp.ClientWSTimeout(ws_close=2.0)
                opening = self._connection.session.ws_connect(self._url, heartbeat=30, max_msg_size=0, timeout=timeout)
                socket = await asyncio.wait_for(opening, 10)
                try:
                    async for message in socket:
                        failed = 0
                        if message.type == aiohttp.WSMsgType.TEXT:
                            with contextlib.suppress(ValueError, TypeError, LookupError, AttributeError):
                                self._hear(json.loads(message.data))
                finally:
                    await socket.close()
            failed += 1
            await asyncio.sleep(pause(failed))

    def _hear(self, event: Any) -> None:
        data = event.get("data") or {}
        if data.get("prompt_id") != self._prompt_id:
            return
        if event["type"] == "progress":
            self._heard(str(data["node"]), int(data["value"]), int(data["max"]))
        elif event["type"] == "executing" and data.get("node") is None:
            self._ended.set()


@contextlib.asynccontextmanager
async def listening(connection: Connection, client: str) -> AsyncIterator[Listener]:
    """A Listener that listens meanwhile."""
    listener = Listener(connection, client)
    task = asyncio.create_task(listener.listen())
    try:
        yield listener
    finally:
        await ended([task], _CLOSING)
