"""The real frontend in a headless Chromium, on the server that the session shares."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from devhost.frontend import Frontend
    from devhost.server import ComfyServer


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless Chromium."""
    from devhost.frontend import open_browser

    with open_browser() as opened:
        yield opened


@pytest.fixture
def frontend(browser: Browser, server: ComfyServer) -> Iterator[Frontend]:
    """A fresh page of the frontend, ready for a graph. A script error on the page fails the test."""
    from devhost.frontend import Frontend

    opened = Frontend(browser, server)
    yield opened
    opened.close()
    assert not opened.errors, f"the page threw: {opened.errors}"
