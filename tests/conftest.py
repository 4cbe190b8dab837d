"""Fixtures of the host and the browser suites: a real ComfyUI server on a base directory of its own.

Nothing here imports ComfyUI, and the core suite, which loads this file too, starts no server.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from devhost.server import ComfyServer

DEVICE = os.environ.get("ZIPLORA_TEST_DEVICE", "cpu")  # "auto" takes the GPU that ComfyUI finds


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in its background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # so that processes of the tests can be interrupted


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of a file that share servers go to one worker together, unless marks of their own say otherwise."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Take off the group that a worker has put behind a test's name: names that are shown can be run again."""
    if hasattr(report, "node") and report.nodeid.rfind("@") > report.nodeid.rfind("]"):
        report.nodeid = report.nodeid.rpartition("@")[0]


@pytest.fixture(scope="session")
def make_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., ComfyServer]]:
    """Start servers, each on a new base directory with pack and miniature; all are stopped at the end.

    packs: folders of more custom nodes.
    """
    from devhost.base import link, make_base
    from devhost.server import ComfyServer

    started = []

    def make(*flags: str, packs: Sequence[Path] = (), **options: Any) -> ComfyServer:
        base = make_base(tmp_path_factory.mktemp("comfyui"))
        for pack in packs:
            link(pack, base / "custom_nodes" / pack.name)
        server = ComfyServer(base, flags, **{"device": DEVICE, **options})
        started.append(server)
        return server.start()

    yield make
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def session_server(make_server: Callable[..., ComfyServer]) -> ComfyServer:
    """The server that the tests of a session share; `server` hands it out."""
    return make_server()


@pytest.fixture
def server(session_server: ComfyServer) -> ComfyServer:
    """The shared server, known to be alive. A test that needs other flags or an empty cache takes `fresh_server`."""
    session_server.check_alive()
    return session_server


@pytest.fixture
def fresh_server(make_server: Callable[..., ComfyServer]) -> Iterator[Callable[..., ComfyServer]]:
    """`fresh_server("--fp16-unet")` starts a server of the test's own, stopped when the test ends."""
    started = []

    def make(*flags: str, **options: Any) -> ComfyServer:
        started.append(make_server(*flags, **options))
        return started[-1]

    yield make
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return Path(__file__).resolve().parent.parent
