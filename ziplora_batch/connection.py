"""Requests to one server: each with deadlines of its own, and each failure as what it is."""

from __future__ import annotations

import asyncio
import email.utils
import http
import itertools
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

import aiohttp

from .address import HEADERS, Address
from .errors import Busy, Denied, Failed, Garbled, NotFound, ServerError, TooLarge, Unreachable

T = TypeVar("T")

# Seconds. A total beside the silence that is allowed, or a byte now and then would keep a request waiting for good.
SHORT = aiohttp.ClientTimeout(total=30, connect=10, sock_connect=10, sock_read=20)
LONG = aiohttp.ClientTimeout(total=180, connect=10, sock_connect=10, sock_read=150)  # while prompts are validated
FILE = 60.0  # for a file, and beside them:
RATE = 100_000  # bytes a second, below which a file is not waited for
_LONGEST_WAIT = 300.0  # of a Retry-After that is obeyed
_OUT_OF_TIME = (asyncio.TimeoutError, TimeoutError)
_NEVER_SENT = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)


class Connection:
    """An async context manager. Whatever goes wrong with a server is raised as a ServerError that names server,
    request and status; never with a header, a user or a password."""

    def __init__(self, address: Address):
        self.address = address
        self.name = address.name

    async def __aenter__(self) -> Connection:
        here = aiohttp.TraceConfig()  # aiohttp's websockets follow redirects, and have no option against it
        here.on_request_redirect.append(_stay)
        self.session = aiohttp.ClientSession(headers=dict(self.address.headers), trace_configs=[here])
        return self

    async def __aexit__(self, *details: object) -> None:
        await self.session.close()

    async def ask(
        self,
        method: str,
        path: str,
        read: Callable[[Any], T],
        timeout: aiohttp.ClientTimeout = SHORT,
        on_400: Callable[[Any], Exception] | None = None,
        **options: Any,
    ) -> T:
        """The answer's JSON (None where it is empty) through `read`, which may fail as code does that meets another
        shape than it expects. on_400: what to raise for the JSON of an answer of status 400."""

        async def whole() -> tuple[int, bytes]:
            async with self.open(method, path, timeout, allow_400=on_400 is not None, **options) as answer:
                return answer.status, await answer.read()

        status, body = await self.reached(method, path, whole())
        if status == 400 and on_400 is not None:
            raise self.understood(method, path, body, on_400)
        return self.understood(method, path, body, read)

    def open(
        self, method: str, path: str, timeout: aiohttp.ClientTimeout, allow_400: bool = False, **options: Any
    ) -> _Answer:
        """A request whose body is still to be read; `async with`. Raises for a status that is no success."""
        url = f"{self.address.url}/{path}"
        request = self.session.request(method, url, timeout=timeout, allow_redirects=False, **options)
        return _Answer(request, lambda answer: self._check(method, path, answer, allow_400))

    async def reached(self, method: str, path: str, request: Awaitable[T]) -> T:
        """What a request brings; Unreachable where the connection fails or the time is over."""
        where = f"{self.name}: no answer to {method} /{path}"
        try:
            return await request
        except _NEVER_SENT as error:
            raise Unreachable(f"{where}: {_words(error)}", sent=False) from error
        except _OUT_OF_TIME as error:
            raise Unreachable(f"{where} in time") from error
        except (aiohttp.ClientError, ConnectionError) as error:
            if isinstance(error, ServerError):
                raise
            raise Unreachable(f"{where}: {_words(error)}") from error

    def understood(self, method: str, path: str, body: bytes, read: Callable[[Any], T]) -> T:
        """A body's JSON through `read`; Garbled where either fails."""
        try:
            return read(json.loads(body) if body.strip() else None)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise Garbled(
                f"{self.name}: the answer to {method} /{path} is not ComfyUI's ({_words(error)}): {body[:60]!r}"
            ) from error

    def _check(self, method: str, path: str, answer: aiohttp.ClientResponse, allow_400: bool) -> None:
        status = answer.status
        if 200 <= status < 300 or (status == 400 and allow_400):
            return
        said = f"{self.name}: HTTP {status} {_phrase(status)}".rstrip() + f" for {method} /{path}"
        wait = _seconds(answer.headers.get("Retry-After", ""))
        if status == 429 or (status == 503 and wait is not None):
            raise Busy(said, status, min(5.0 if wait is None else wait, _LONGEST_WAIT))
        if status in (401, 403, 407):
            advice = f"user and password belong into the address, a token into --header or {HEADERS}"
            raise Denied(f"{said}; {advice}", status)
        if status == 404:
            raise NotFound(said, status)
        if status == 413:
            raise TooLarge(f"{said}: more than the server takes at once (ComfyUI's --max-upload-size)", status)
        if 300 <= status < 400:
            raise Failed(f"{said}, which sends one elsewhere; give the address where ComfyUI itself answers", status)
        raise Failed(said, status)


async def _stay(session: object, context: object, redirect: aiohttp.TraceRequestRedirectParams) -> None:
    """No request follows a redirect: it would carry headers, tokens among them, to whom nobody has named."""
    redirect.response.close()
    raise aiohttp.ClientError("sent elsewhere")


class _Answer:
    """aiohttp's own context manager, with a look at the status."""

    def __init__(self, request: Any, check: Callable[[aiohttp.ClientResponse], None]):
        self._request, self._check = request, check

    async def __aenter__(self) -> aiohttp.ClientResponse:
        answer: aiohttp.ClientResponse = await self._request.__aenter__()
        try:
            self._check(answer)
        except ServerError:
            answer.close()
            raise
        return answer

    async def __aexit__(self, *details: Any) -> None:
        await self._request.__aexit__(*details)


async def patiently(ask: Callable[[], Awaitable[T]], tries: int, seconds: float = 0.0, busy: float = 600.0) -> T:
    """Ask until an answer comes. The last error is raised where asking again cannot help, and after so many tries; if
    nobody answers, after so many seconds too; a server that asks for time has it, `busy` seconds at most."""
    began = time.monotonic()
    waited = 0.0
    failed = 0
    while True:
        try:
            return await ask()
        except Busy as error:
            if waited >= busy:
                raise
            waited += max(error.wait, 0.1)
            await asyncio.sleep(max(error.wait, 0.1))
        except ServerError as error:
            failed += 1
            late = not error.dead or time.monotonic() - began - waited >= seconds
            if not error.passing or (failed >= tries and late):
                raise
            await asyncio.sleep(pause(failed))


async def ended(tasks: Sequence[asyncio.Task[Any]], seconds: float) -> None:
    """Cancel tasks until they have ended; once more after so many seconds: up to Python 3.11 `asyncio.wait_for` loses
    a cancellation that comes in the moment in which what it waits for comes."""
    going = set(tasks)
    while going:
        for task in going:
            task.cancel()
        done, going = await asyncio.wait(going, timeout=seconds)
        for task in done:
            task.cancelled() or task.exception()  # looked at, so that nobody complains of it later


def pause(failed: int) -> float:
    """Seconds to wait after so many failures in a row."""
    return min(0.1 * 2.0**failed, 5.0)


async def looks(seconds: float) -> AsyncIterator[None]:
    """Moments at which to look whether something has happened: now, and with growing pauses until the time is over."""
    end = time.monotonic() + seconds
    for count in itertools.count(1):
        yield
        left = end - time.monotonic()
        if left <= 0:
            return
        await asyncio.sleep(min(pause(count), left))


def _words(error: BaseException) -> str:
    return f"{type(error).__name__} {str(error)[:200]}".strip()


def _phrase(status: int) -> str:
    try:
        return http.HTTPStatus(status).phrase
    except ValueError:
        return ""


def _seconds(said: str) -> float | None:
    """A Retry-After: seconds, or a date."""
    try:
        return max(0.0, float(said))
    except ValueError:
        try:
            return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - time.time())
        except (ValueError, TypeError):
            return None
