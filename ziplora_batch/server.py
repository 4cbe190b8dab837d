"""One ComfyUI server: its queue, its history, its files, its progress."""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp

from .jobs import Prompt

_TROUBLE = (aiohttp.ClientError, OSError, asyncio.TimeoutError)


class ServerLost(ConnectionError):
    """The server is gone, or has forgotten the prompt."""


class Refused(ValueError):
    """The server does not accept a prompt: its own words."""


class Server:
    """An async context manager. Every method raises ServerLost where the server does not answer as a server does."""

    def __init__(self, url: str):
        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        self.name = self.url.partition("://")[2]
        self._client = uuid.uuid4().hex

    async def __aenter__(self) -> Server:
        timeout = aiohttp.ClientTimeout(total=None, connect=10, sock_connect=10, sock_read=60)
        self._session = aiohttp.ClientSession(timeout=timeout)
        return self

    async def __aexit__(self, *details: object) -> None:
        await self._session.close()

    async def _ask(self, method: str, path: str, **options: Any) -> Any:
        try:
            async with self._session.request(method, f"{self.url}/{path}", **options) as answer:
                body = await answer.read()
                if answer.status == 400 and path == "prompt":
                    raise Refused(_words(json.loads(body)))
                answer.raise_for_status()
                return json.loads(body) if body else None
        except Refused:
            raise
        except (*_TROUBLE, ValueError) as error:
            raise ServerLost(f"{self.name}: {type(error).__name__} {error}".strip()) from error

    async def alive(self) -> bool:
        """Whether it answers."""
        try:
            await self._ask("GET", "queue")
        except ServerLost:
            return False
        return True

    async def choices(self, node: str, name: str) -> list[str]:
        """What a combo input lists; empty where the server has no such node or input."""
        info = (await self._ask("GET", f"object_info/{node}") or {}).get(node, {}).get("input", {})
        kind, *rest = {**info.get("required", {}), **info.get("optional", {})}.get(name, [[]])
        return list(kind if isinstance(kind, list) else rest[0].get("options", []) if rest else [])

    async def queue(self, prompt: Prompt, prompt_id: str) -> None:
        """Raises Refused where validation fails."""
        await self._ask("POST", "prompt", json={"prompt": prompt, "prompt_id": prompt_id, "client_id": self._client})

    async def history(self, prompt_id: str) -> dict[str, Any] | None:
        """What is left of a prompt that has ended."""
        return (await self._ask("GET", f"history/{prompt_id}") or {}).get(prompt_id)

    async def queued(self) -> set[str]:
        """Ids of the prompts that wait or run."""
        queue = await self._ask("GET", "queue")
        return {item[1] for part in ("queue_running", "queue_pending") for item in queue[part]}

    async def ended(self) -> set[str]:
        """Ids of the last prompts that have ended."""
        return set(await self._ask("GET", "history", params={"max_items": 1000}))

    async def cancel(self, prompt_id: str) -> None:
        """Take a prompt out of the queue, or interrupt it if it runs."""
        await self._ask("POST", "queue", json={"delete": [prompt_id]})
        await self._ask("POST", "interrupt", json={"prompt_id": prompt_id})

    async def forget(self) -> None:
        """Unload models and forget cached outputs, so that the next prompt is run whole."""
        await self._ask("POST", "free", json={"unload_models": True, "free_memory": True})

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
        try:
            socket = await self._session.ws_connect(
                f"{self.url}/ws?clientId={self._client}", heartbeat=60, max_msg_size=0
            )
        except (*_TROUBLE, ValueError) as error:
            raise ServerLost(f"{self.name}: {type(error).__name__} {error}".strip()) from error
        try:
            yield socket
        finally:
            await socket.close()

    async def follow(
        self,
        socket: aiohttp.ClientWebSocketResponse,
        prompt_id: str,
        heard: Callable[[str, int, int], None] = lambda node, value, end: None,
    ) -> dict[str, Any]:
        """The history of a prompt once it has ended. heard: (node id, value, maximum) of its progress."""
        while True:
            known = prompt_id in await self.queued()
            entry = await self.history(prompt_id)
            if entry is not None:
                return entry
            if not known:
                raise ServerLost(f"{self.name} has forgotten the prompt")
            await self._listen(socket, prompt_id, heard)

    async def _listen(self, socket: aiohttp.ClientWebSocketResponse, prompt_id: str, heard: Any) -> None:
        """Until the prompt ends, or for ten seconds, since a message may have been missed."""

        async def hear() -> None:
            async for message in socket:
                event = json.loads(message.data) if message.type == aiohttp.WSMsgType.TEXT else {}
                data = event.get("data") or {}
                if data.get("prompt_id") != prompt_id:
                    continue
                if event["type"] == "progress":
                    heard(str(data["node"]), int(data["value"]), int(data["max"]))
                elif event["type"] == "executing" and data.get("node") is None:
                    return
            raise ServerLost(f"{self.name} closed the connection")

        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(hear(), 10)

    async def fetch(self, entry: dict[str, str], path: Path) -> None:
        """Write a file that an output names, whole or not at all."""
        partial = path.with_name(f".{path.name}.part")
        place = {k: entry.get(k, "") for k in ("filename", "subfolder", "type")}
        try:
            async with self._session.get(f"{self.url}/view", params=place) as answer:
                answer.raise_for_status()
                with partial.open("wb") as file:
                    async for block in answer.content.iter_chunked(1 << 20):
                        file.write(block)
            partial.replace(path)
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:  # an OSError is of the disk here
            raise ServerLost(f"{self.name}: {type(error).__name__} {error}".strip()) from error
        finally:
            partial.unlink(missing_ok=True)

    async def upload(self, picture: Path, name: str) -> None:
        """Put a picture into the server's input folder."""
        form = aiohttp.FormData({"overwrite": "true"})
        form.add_field("image", picture.read_bytes(), filename=name)
        await self._ask("POST", "upload/image", data=form)


def _words(answer: dict[str, Any]) -> str:
    """Why a prompt was refused, in one line."""
    found = [
        f"{node['class_type']} ({key}): {_sentence(error)}"
        for key, node in (answer.get("node_errors") or {}).items()
        for error in node["errors"]
    ]
    error = answer.get("error") or {}
    text = error.get("message", str(error)) if isinstance(error, dict) else str(error)
    return "; ".join(dict.fromkeys(found) or [text])[:1000]


def _sentence(error: dict[str, Any]) -> str:
    """A node's own words alone, without the name of the input that they were said about."""
    if error.get("type") == "custom_validation_failed":
        return str(error["details"]).partition(" - ")[2] or str(error["details"])
    return f"{error['message']}: {error['details']}"
