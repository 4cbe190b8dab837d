"""One ComfyUI server: its queue, its history, its files, its progress."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import mimetypes
import re
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import aiohttp

from . import progress, refusals
from .address import Address, address
from .connection import FILE, LONG, RATE, SHORT, Connection, looks, patiently, pause
from .errors import Denied, Failed, Forgotten, Garbled, NotFound, Refused, ServerError, ServerLost, Unreachable
from .folder import written
from .jobs import Prompt
from .names import plain

__all__ = ["Denied", "Forgotten", "Refused", "Server", "ServerError", "ServerLost"]

T = TypeVar("T")

LOST_AFTER = 30.0  # seconds of failed requests, three of them at least, after which a server counts as lost
_TRIES = 3
_SETTLING = 3.0  # seconds that a server may take over a request whose answer we did not get
_CANCELLING = 5.0  # seconds that a prompt may take to notice that it is cancelled
_SILENT = SHORT.sock_read


class Server:
    """An async context manager. Every method raises a ServerError where the server does not answer as a server does;
    questions are asked three times before that."""

    def __init__(self, where: str | Address, headers: Mapping[str, str] | None = None, lost_after: float = LOST_AFTER):
        """Raises BatchError where the address cannot be one. headers: sent with every request."""
        self.address = where if isinstance(where, Address) else address(where, headers)
        self.url, self.name, self.identity = self.address.url, self.address.name, self.address.identity
        self.lost_after = lost_after
        self._client = uuid.uuid4().hex
        self.forgetful = False  # whether it has forgotten what it had drawn before we came
        self._sending: asyncio.Future[tuple[str, str]] | None = None
        self._outputs: dict[str, bool] = {}  # whether a type of node is an output
        self._twice: set[str] = set()  # prompts that may have arrived twice
        self._to = Connection(self.address)

    async def __aenter__(self) -> Server:
        await self._to.__aenter__()
        return self

    async def __aexit__(self, *details: object) -> None:
        await self._to.__aexit__(*details)

    async def _get(self, path: str, read: Callable[[Any], T], tries: int = _TRIES, **options: Any) -> T:
        return await patiently(lambda: self._to.ask("GET", path, read, **options), tries)

    async def alive(self) -> bool:
        """Whether it answers. Raises Denied."""
        try:
            await self.queued()
        except Denied:
            raise
        except ServerError:
            return False
        return True

    async def choices(self, node: str, name: str) -> list[str]:
        """What a combo input lists; empty where the server has no such node or input."""

        def read(answer: dict[str, Any]) -> list[str]:
            info = answer.get(node, {}).get("input", {})
            kind, *rest = {**info.get("required", {}), **info.get("optional", {})}.get(name, [[]])
            return [str(c) for c in (kind if isinstance(kind, list) else rest[0].get("options", []) if rest else [])]

        return await self._get(f"object_info/{node}", read)

    async def nodes(self) -> dict[str, str]:
        """Each type of node that the server has, and the Python module that it comes from."""

        def read(answer: dict[str, Any]) -> dict[str, str]:
            return {str(node): str(info.get("python_module", "")) for node, info in answer.items()}

        return await self._get("object_info", read, timeout=LONG)

    async def history(self, prompt_id: str, tries: int = _TRIES) -> dict[str, Any] | None:
        """What is left of a prompt that has ended."""

        def read(answer: dict[str, Any]) -> dict[str, Any] | None:
            entry = answer.get(prompt_id)
            if entry is None:
                return None
            if not isinstance(entry["outputs"], dict) or not isinstance(entry.get("status"), dict | None):
                raise TypeError("no history entry")
            return dict(entry)

        return await self._get(f"history/{prompt_id}", read, tries)

    async def queued(self, tries: int = _TRIES) -> dict[str, list[Any]]:
        """The prompts that wait or run, by id: number, id, prompt, further data, ids of the output nodes to run."""
        parts = ("queue_running", "queue_pending")

        def read(answer: dict[str, Any]) -> dict[str, list[Any]]:
            return {str(item[1]): list(item) for part in parts for item in answer[part]}

        return await self._get("queue", read, tries)

    async def find(self, prompt_id: str, settling: float = 0.0) -> list[Any] | None:
        """What the queue, or the history, has of a prompt: as `queued`, or empty where it says no more of it; None
        where the server has it not. settling: seconds that it may still take to put it there."""
        async for _ in looks(settling):
            if (item := (await self.queued()).get(prompt_id)) is not None:
                return item
            if (entry := await self.history(prompt_id)) is not None:
                return list(item) if isinstance(item := entry.get("prompt"), list) else []
        return None

    async def dropped(self, item: list[Any]) -> list[str]:
        """Output nodes of a prompt, as `find` has it, that the server does not run: of a prompt with some outputs that
        it accepts and some that it does not, it runs the first alone. Empty where the server does not say."""
        try:
            run = set(map(str, item[4]))
            others = {str(key): str(node["class_type"]) for key, node in item[2].items() if str(key) not in run}
        except (TypeError, LookupError, AttributeError):
            return []
        return [f"{kind} ({key})" for key, kind in others.items() if await self._is_output(kind)]

    async def _is_output(self, kind: str) -> bool:
        if kind not in self._outputs:
            path = f"object_info/{quote(kind, safe='')}"
            try:
                found = await self._get(path, lambda answer: answer.get(kind, {}).get("output_node") is True)
            except (Failed, Garbled, NotFound) as error:
                if error.dead:
                    raise
                found = False
            self._outputs[kind] = found
        return self._outputs[kind]

    async def queue(self, prompt: Prompt, prompt_id: str) -> None:
        """Put a prompt into the queue, once: where the answer is lost, it is looked for before it is sent again.

        Raises Refused where validation fails, of a single output too: a picture that is not drawn is none.
        """
        body = {"prompt": prompt, "prompt_id": prompt_id, "client_id": self._client}

        def read(answer: dict[str, Any]) -> tuple[str, str]:
            return str(answer["prompt_id"]), refusals.words(answer) if answer.get("node_errors") else ""

        async def send() -> tuple[str, str]:
            """Once begun it goes on though we are stopped, or nobody could tell whether it is still to arrive."""
            request = self._to.ask(
                "POST", "prompt", read, LONG, on_400=lambda answer: Refused(refusals.words(answer)), json=body
            )
            self._sending = asyncio.ensure_future(request)
            return await asyncio.shield(self._sending)

        began = time.monotonic()
        for count in itertools.count(1):
            try:
                given, errors = await patiently(send, 1)
                break
            except (Unreachable, Garbled, Failed, NotFound) as error:
                settling = _may_have_arrived(error)
                try:
                    if settling is not None and (found := await self.find(prompt_id, settling)) is not None:
                        if dropped := await self.dropped(found):
                            await self._withdraw(prompt_id)
                            raise Refused(f"{self.name} does not accept what {', '.join(dropped)} is given") from error
                        return
                except Denied as denied:
                    raise ServerLost(str(denied), dead=False) from error
                if count >= _TRIES and (not error.dead or time.monotonic() - began >= self.lost_after):
                    raise
                if settling is not None:
                    self._twice.add(prompt_id)
                await asyncio.sleep(pause(count))
        if errors:
            await self._withdraw(given)
            raise Refused(errors)
        if given != prompt_id:
            await self.cancel(given)
            raise Denied(f"{self.name} gives prompts ids of its own, by which no row is found again; update ComfyUI")

    async def settled(self) -> None:
        """Until no prompt is on its way any more."""
        if self._sending is not None:
            await asyncio.gather(self._sending, return_exceptions=True)

    async def cancel(self, prompt_id: str) -> None:
        """Take a prompt out of the queue, or interrupt it if it runs."""
        await self.unqueue(prompt_id)
        await self._post("interrupt", {"prompt_id": prompt_id})

    async def end(self, prompt_id: str) -> dict[str, Any] | None:
        """Cancel a prompt until it has ended; its history, where it has one: it may have ended just before."""
        while True:
            await self.cancel(prompt_id)  # again and again: one that comes as the prompt begins is lost
            entry = await self.history(prompt_id)
            if entry is not None:
                return entry
            if prompt_id not in await self.queued():
                return await self.history(prompt_id)
            await asyncio.sleep(0.1)

    async def _withdraw(self, prompt_id: str) -> None:
        """A prompt that is refused, though the server runs a part of it; one that does not end soon is left to it."""
        try:
            await asyncio.wait_for(self.end(prompt_id), _CANCELLING)
        except asyncio.TimeoutError:
            pass
        except (Failed, Garbled, NotFound) as error:
            if error.dead:
                raise

    async def unqueue(self, prompt_id: str) -> None:
        """Take a prompt out of the queue, if it waits there."""
        await self._post("queue", {"delete": [prompt_id]})

    async def forget(self) -> None:
        """Unload models and forget cached outputs, so that the next prompt is run whole, or the one after it: a server
        may take a prompt first that comes at once. `remembered` tells."""
        await self._post("free", {"unload_models": True, "free_memory": True})
        self.forgetful = True

    @staticmethod
    def remembered(entry: Mapping[str, Any]) -> bool:
        """Whether a prompt's history says that something came from the server's cache."""
        said = [m for m in (entry.get("status") or {}).get("messages") or [] if isinstance(m, list) and len(m) > 1]
        return any(kind == "execution_cached" and isinstance(of, dict) and of.get("nodes") for kind, of, *_ in said)

    async def _post(self, path: str, body: Any) -> None:
        await patiently(lambda: self._to.ask("POST", path, lambda answer: None, json=body), _TRIES)

    def listening(self) -> contextlib.AbstractAsyncContextManager[progress.Listener]:
        """Hear of progress meanwhile, for `follow`."""
        return progress.listening(self._to, self._client)

    async def follow(
        self,
        listener: progress.Listener,
        prompt_id: str,
        heard: progress.Heard = lambda node, value, end: None,
    ) -> dict[str, Any]:
        """The history of a prompt once it has ended. heard: (node id, value, maximum) of its progress.

        Raises ServerLost after several failed looks over `lost_after` seconds, Forgotten where the server knows nothing
        of the prompt, Denied.
        """
        listener.follow(prompt_id, heard)
        failed, unknown, calm, since, answered = 0, 0, 0, time.monotonic(), False
        while True:
            try:
                entry = await self.history(prompt_id, tries=1)
                if entry is None and prompt_id not in await self.queued(tries=1):
                    entry = await self.history(prompt_id, tries=1)  # it may have ended between the two
                    unknown = 0 if entry is not None else unknown + 1
                if entry is not None:
                    if prompt_id in self._twice:
                        await self.unqueue(prompt_id)
                        self._twice.discard(prompt_id)
                    return entry
                failed, calm, answered = 0, calm + 1, True
            except ServerError as error:
                failed += 1
                since = time.monotonic() if failed == 1 else since
                if not error.passing:
                    raise
                if failed >= _TRIES and time.monotonic() - since >= self.lost_after:
                    raise ServerLost(f"{error} ({failed} times in a row)", error.dead, answered) from error
            if unknown >= 2:
                raise Forgotten(f"{self.name} has forgotten the prompt", answered=True)
            await listener.until_ended(pause(failed or unknown or calm))

    async def fetch(self, entry: Mapping[str, str], path: Path) -> tuple[int, str]:
        """Write a file that an output names, whole and onto the disk, or not at all: its size and SHA-256.

        Raises ServerError, and OSError where the disk takes it not.
        """
        place = {k: str(entry.get(k) or "") for k in ("filename", "subfolder", "type")}
        if any(
            re.search("[\ud800-\udfff]", value) for value in place.values()
        ):  # left out, they would name another file
            raise Garbled(f"{self.name}: {place['filename']!r} is a name that no request can carry")
        timeout = aiohttp.ClientTimeout(total=None, connect=10, sock_connect=10, sock_read=_SILENT)

        async def get() -> tuple[int, str]:
            digest, size = hashlib.sha256(), 0
            async with self._to.open("GET", "view", timeout, params=place) as answer:
                _check_kind(self.name, place["filename"], answer.content_type)
                seconds = FILE + (answer.content_length or FILE * RATE) / RATE
                with written(path) as file:

                    async def read() -> int:
                        done = 0
                        async for block in answer.content.iter_chunked(1 << 20):
                            file.write(block)
                            digest.update(block)
                            done += len(block)
                        return done

                    size = await asyncio.wait_for(self._to.reached("GET", "view", read()), seconds)
                    if not size:
                        raise Garbled(f"{self.name}: {place['filename']} came empty")
            return size, digest.hexdigest()

        return await patiently(lambda: self._to.reached("GET", "view", get()), _TRIES, self.lost_after)

    async def upload(self, picture: Path, name: str) -> str:
        """Put a picture into the server's input folder; the name that it has there.

        The server keeps what it has: of the same content the same file, of another a new name.
        """
        data = picture.read_bytes()

        def read(answer: dict[str, Any]) -> str:
            if not answer["name"]:
                raise ValueError("no name")
            return "/".join(filter(None, (str(answer.get("subfolder") or ""), str(answer["name"]))))

        async def send() -> str:
            form = aiohttp.FormData(quote_fields=False)  # the host takes UTF-8, and would keep %20 as it is
            form.add_field("image", data, filename=plain(name), content_type="application/octet-stream")
            seconds = FILE + len(data) / RATE
            timeout = aiohttp.ClientTimeout(total=seconds, connect=10, sock_connect=10, sock_read=seconds)
            return await self._to.ask("POST", "upload/image", read, timeout, data=form)

        return await patiently(send, _TRIES, self.lost_after)


def _may_have_arrived(error: ServerError) -> float | None:
    """Seconds after which it is known whether a request that failed so has done its work; None where it has not."""
    if isinstance(error, NotFound) or (isinstance(error, Unreachable) and not error.sent):
        return None
    return _SETTLING if error.status in (0, 502, 504) else 0.0


def _check_kind(server: str, name: str, kind: str) -> None:
    """A picture must come as one: a page that asks for a password is none."""
    expected = mimetypes.guess_type(name)[0] or ""
    if kind in ("text/html", "application/json") and expected != kind:
        raise Garbled(f"{server}: {name} came as {kind}")
