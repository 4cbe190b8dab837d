"""Where a server is, and what it wants to be shown: neither its password nor a token is ever written anywhere."""

from __future__ import annotations

import ipaddress
import re
from base64 import b64encode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from .errors import BatchError

HEADERS = "ZIPLORA_BATCH_HEADERS"  # environment variable: a NAME:VALUE a line
_HERE = {"localhost", "127.0.0.1", "::1", "0.0.0.0", "::"}
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Address:
    """url: without user and password. identity: the same however the server is spelled. headers: sent with every
    request, and kept out of everything that is printed."""

    url: str
    identity: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        return self.url.partition("://")[2]


def address(given: str, headers: Mapping[str, str] | None = None) -> Address:
    """`127.0.0.1:8188`, `https://user:password@host/path/`. Raises BatchError, which does not repeat what was given."""
    try:
        parts = urlsplit(given.strip() if "://" in given else f"http://{given.strip()}")
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError as error:
        raise BatchError("an address of --server cannot be read; write http://HOST:PORT") from error
    if parts.scheme not in _PORTS or not host or re.search(r"[\s\\]", parts.netloc):
        raise BatchError("an address of --server is none of http or https; write http://HOST:PORT")
    if parts.query or parts.fragment:
        raise BatchError(
            f"the address of {host} goes on after '?' or '#', which no request could keep; "
            f"give a token by --header or {HEADERS}"
        )
    shown = _literal(host)
    try:
        shown.encode("idna")  # as the resolver will
    except UnicodeError as error:
        raise BatchError(f"the address of --server names no host: '{host}'; write http://HOST:PORT") from error
    path = parts.path.rstrip("/")
    url = f"{parts.scheme}://{shown}{'' if port is None else f':{port}'}{path}"
    one = "localhost" if host in _HERE or shown.strip("[]") in _HERE else shown
    sent = dict(headers or {})
    if parts.username is not None or parts.password is not None:
        pair = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
        sent = {k: v for k, v in sent.items() if k.lower() != "authorization"}
        sent["Authorization"] = "Basic " + b64encode(pair.encode()).decode()
    return Address(url, f"{parts.scheme}://{one}:{port or _PORTS[parts.scheme]}{path}", sent)


def _literal(host: str) -> str:
    """An IP address in its shortest form, in brackets where it needs them; any other host as it is."""
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return host
    return f"[{found}]" if found.version == 6 else str(found)


def identity(url: str) -> str:
    """Of a server that an earlier run wrote down; the text itself where it is no address."""
    try:
        return address(url).identity
    except BatchError:
        return url


def addresses(given: Iterable[str], headers: Mapping[str, str] | None = None) -> list[Address]:
    """Each server once, by the first spelling of it that carries a user and password, else by the first of all.

    Raises BatchError.
    """
    found: dict[str, Address] = {}
    for one in (address(text, headers) for text in given):
        first = found.setdefault(one.identity, one)
        if dict(first.headers) == dict(headers or {}) != dict(one.headers):
            found[one.identity] = one
    return list(found.values())


def read_headers(given: Iterable[str], environment: Mapping[str, str]) -> dict[str, str]:
    """NAME:VALUE from the command line, and from HEADERS, which no list of processes shows. Raises BatchError."""
    found: dict[str, str] = {}
    lines = [line for line in environment.get(HEADERS, "").splitlines() if line.strip()]
    for text in [*lines, *given]:
        name, colon, value = text.partition(":")
        name, value = name.strip(), value.strip()
        if not colon or not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) or not value.isprintable():
            raise BatchError(f"a header of --header or {HEADERS} is not NAME:VALUE on one line")
        found = {k: v for k, v in found.items() if k.lower() != name.lower()} | {name: value}
    return found
