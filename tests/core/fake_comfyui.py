"""What the batch client speaks to, without ComfyUI: an HTTP server in the test's own loop, which fails as told."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from ziplora_batch import connection, jobs, runner
from ziplora_batch import server as client
from ziplora_batch.results import Results
from ziplora_batch.server import Server

PICTURE = b"\x89PNG of "


class FakeComfyUI:
    """Draws the text of a prompt's node "1" at once, into a file that it names after it, and caches as ComfyUI does.

    answers: instead of its own, by "METHOD /path" (of a path below another, the first step). asked: all of those.
    """

    def __init__(self, **answers: Callable[[web.Request], Awaitable[web.StreamResponse]]):
        self.answers = {name.replace("_", " /"): answer for name, answer in answers.items()}
        self.asked: list[str] = []
        self.prompts: list[str] = []  # ids, in the order that they came in
        self.running: list[list[Any]] = []
        self.history: dict[str, dict[str, Any]] = {}
        self.output: dict[str, bytes] = {}
        self.cache: dict[str, str] = {}
        self.outputs: list[str] | None = None  # ids of the nodes that are run; None: all
        self.shown: dict[str, Any] = {}  # what else the history says of a node "1"
        self.draws: bytes | None = None  # the same picture of every text
        self.held = False  # whether prompts stay in the queue
        self.busy = False  # whether what is to be forgotten is forgotten after the next prompt
        self.forgets = False
        self.down: int | None = None  # status of every answer

    def count(self, what: str) -> int:
        return self.asked.count(what)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        what = f"{request.method} /{request.path.split('/')[1]}"
        self.asked.append(what)
        if self.down is not None:
            return web.Response(status=self.down)
        if what in self.answers:
            return await self.answers[what](request)
        if what == "GET /queue":
            return web.json_response({"queue_running": self.running, "queue_pending": []})
        if what == "GET /history":
            key = request.path.rpartition("/")[2]
            return web.json_response({key: self.history[key]} if key in self.history else {})
        if what == "GET /object_info":
            kind = request.path.rpartition("/")[2]
            return web.json_response({kind: {"output_node": kind in ("Save", "Show")}})
        if what == "POST /prompt":
            self.take(await request.json())
            return web.json_response({"prompt_id": self.prompts[-1], "node_errors": {}})
        if what == "GET /view":
            data = self.output.get(request.query["filename"])
            return web.Response(status=404) if data is None else web.Response(body=data, content_type="image/png")
        if what == "POST /upload":
            return web.json_response({"name": (await request.post())["image"].filename})
        if what == "POST /free":
            self.forgets = True
            if not self.busy:
                self.forget()
        if what in ("POST /queue", "POST /interrupt"):
            self.running.clear()
        return web.Response(status=404 if what == "GET /ws" else 200)

    def take(self, body: dict[str, Any]) -> None:
        """A prompt into the queue, or at once through it."""
        prompt_id, prompt = body["prompt_id"], body["prompt"]
        self.prompts.append(prompt_id)
        self.running.append([0, prompt_id, prompt, {}, list(prompt) if self.outputs is None else self.outputs])
        if not self.held:
            self.finish()

    def forget(self) -> None:
        if self.forgets:
            self.cache.clear()
        self.forgets = False

    def finish(self) -> None:
        for item in self.running:
            text = item[2]["1"]["inputs"]["text"]
            cached = ["1"] if text in self.cache else []
            if text not in self.cache:
                self.cache[text] = f"{text}_{len(self.output):05}_.png"
                self.output[self.cache[text]] = self.draws or PICTURE + text.encode()
            images = [{"filename": self.cache[text], "subfolder": "", "type": "output"}]
            self.history[item[1]] = {
                "prompt": item,
                "outputs": {"1": {"images": images, **self.shown}},
                "status": {"status_str": "success", "messages": [["execution_cached", {"nodes": cached}]]},
            }
            self.forget()
        self.running.clear()

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.handle)
        served = web.AppRunner(app, shutdown_timeout=0.1)
        await served.setup()
        await web.TCPSite(served, "127.0.0.1", 0).start()
        try:
            yield "http://{}:{}".format(*served.addresses[0][:2])
        finally:
            await served.cleanup()

    @contextlib.contextmanager
    def beside(self) -> Iterator[str]:
        """In a loop of its own, for a client that has one."""
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever)
        thread.start()

        def do(work: Any) -> Any:
            return asyncio.run_coroutine_threadsafe(work, loop).result(30)

        serving = self.serving()
        try:
            yield do(serving.__aenter__())
        finally:
            do(serving.__aexit__(None, None, None))
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()


def hasten(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses between tries; and one fake is one server, though it has a new port in each run."""
    for module in (connection, client):
        monkeypatch.setattr(module, "pause", lambda failed: 0.005)
    monkeypatch.setattr(runner, "_PAUSE", 0.01)
    monkeypatch.setattr(client, "_SETTLING", 0.0)
    monkeypatch.setattr(runner, "identity", lambda url: "fake 0")


def rows(*texts: str, uploads: dict[str, Path] | None = None) -> list[jobs.Job]:
    """Jobs that draw these texts."""
    graph = {"1": {"class_type": "Save", "inputs": {"text": "", "image": ""}}}
    made = [jobs.Row({"text": text, "name": text}) for text in texts]
    for row in made:
        row.uploads = (uploads or {}) if row is made[0] else {}
        row.values["image"] = next(iter(row.uploads), "-")
    return jobs.make(graph, made)


async def cut(request: web.Request) -> web.StreamResponse:
    """The connection ends, and no answer comes."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def batch(fakes: list[FakeComfyUI], made: list[jobs.Job], folder: Path, **options: Any) -> Results:
    """One run of the client; the results, which other clients may have again."""
    results = Results(folder)
    try:
        async with contextlib.AsyncExitStack() as stack:
            urls = [await stack.enter_async_context(fake.serving()) for fake in fakes]
            servers = [await stack.enter_async_context(Server(url, lost_after=0.0)) for url in urls]
            for number, server in enumerate(servers):
                server.identity = f"fake {number}"
            work = runner.Batch(made, servers, results, **{"patience": 20.0, "quiet": True, **options})
            await asyncio.wait_for(work.run(), 60)
    finally:
        results.close()
    return results


def run(fake: FakeComfyUI, made: list[jobs.Job], folder: Path, **options: Any) -> Results:
    return asyncio.run(batch([fake], made, folder, **options))
