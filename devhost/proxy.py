"""A reverse proxy in front of a server, which fails where it is told to: what networks and gateways do to a client.

with Proxy(server.url) as proxy:
    proxy.rule = lambda request, number: "cut" if request.path == "/queue" else None
    ...  # speak to proxy.url
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from aiohttp import ClientSession, ClientTimeout, WSMsgType, web

# What may become of a request. A number is a status that the proxy answers itself.
CUT = "cut"  # the connection closes, and nothing reaches the server
LATE = "late"  # the server does what is asked, and its answer is lost
HALF = "half"  # half of the body comes
HTML = "html"  # a page, of status 200
JSON = "json"  # other JSON than anything expects, of status 200
HOLD = "hold"  # it reaches the server once `released` is set, whether anyone still waits for the answer or not
DRIP = "drip"  # a byte each half second, for good
Rule = Callable[[web.Request, int], Any]  # of a request and its number: None (pass it on), a word above, or a status

_OURS = {"host", "content-length", "transfer-encoding", "connection", "upgrade"}


class Proxy:
    """rule: what becomes of a request. socket_seconds: after which every websocket is cut. asked: (method, path) of
    every request. sockets: websockets that were opened."""

    def __init__(self, target: str, rule: Rule = lambda request, number: None, socket_seconds: float | None = None):
        self.target, self.rule, self.socket_seconds = target, rule, socket_seconds
        self.retry_after: str | None = None  # header of the statuses that the proxy answers itself
        self.asked: list[tuple[str, str]] = []
        self.failed = 0
        self.released = threading.Event()
        self.sockets = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        self._do(self._start())
        return self

    def __exit__(self, *details: object) -> None:
        self._do(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _start(self) -> None:
        self._session = ClientSession(timeout=ClientTimeout(total=None), auto_decompress=False)
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"

    async def _stop(self) -> None:
        await self._runner.cleanup()
        await self._session.close()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append((request.method, request.path))
        fate = self.rule(request, len(self.asked))
        if fate is not None:
            self.failed += 1
        if isinstance(fate, int):
            headers = {} if self.retry_after is None else {"Retry-After": self.retry_after}
            return web.Response(status=fate, headers=headers)
        if fate == HTML:
            return web.Response(text="<html>sign in</html>", content_type="text/html")
        if fate == JSON:
            return web.json_response({"detail": ["something else"]})
        if fate == CUT:
            return self._cut(request)
        if request.headers.get("Upgrade", "").lower() == "websocket":
            return await self._websocket(request)
        headers = {k: v for k, v in request.headers.items() if k.lower() not in _OURS}
        body = await request.read()
        while fate == HOLD and not self.released.is_set():
            await asyncio.sleep(0.01)
        url = f"{self.target}{request.path_qs}"
        async with self._session.request(request.method, url, headers=headers, data=body) as answer:
            found = await answer.read()
            kept = {k: v for k, v in answer.headers.items() if k.lower() not in _OURS}
        if fate == LATE:
            return self._cut(request)
        if fate in (None, HOLD):
            return web.Response(status=answer.status, headers=kept, body=found)
        response = web.StreamResponse(status=answer.status, headers={**kept, "Content-Length": str(len(found))})
        await response.prepare(request)
        if fate == HALF:
            await response.write(found[: len(found) // 2])
            return self._cut(request)
        for byte in found:
            await response.write(bytes([byte]))
            await asyncio.sleep(0.5)
        return response

    def _cut(self, request: web.Request) -> web.Response:
        if request.transport is not None:
            request.transport.abort()
        return web.Response()

    async def _websocket(self, request: web.Request) -> web.StreamResponse:
        self.sockets += 1
        ours = web.WebSocketResponse(max_msg_size=0)
        await ours.prepare(request)
        headers = {k: v for k, v in request.headers.items() if k.lower() in ("authorization", "cookie")}
        async with self._session.ws_connect(
            f"{self.target}{request.path_qs}", headers=headers, max_msg_size=0
        ) as theirs:

            async def pass_on() -> None:
                async for message in theirs:
                    if message.type == WSMsgType.TEXT:
                        await ours.send_str(message.data)
                    elif message.type == WSMsgType.BINARY:
                        await ours.send_bytes(message.data)

            task = asyncio.create_task(pass_on())
            done, _ = await asyncio.wait(
                [task, asyncio.create_task(ours.receive())],
                timeout=self.socket_seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
            task.cancel()
            if not done:
                return self._cut(request)
        return ours
