"""The real frontend in a headless Chromium, on the server that the session shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
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
def kept() -> Callable[[Path, str], None]:
    """Keep a screenshot: as a test artefact, and with ZIPLORA_PUBLISH set as the README's, docs/<name>.jpg."""
    import os
    import shutil

    from PIL import Image

    from devhost.install import DEV, ROOT

    def keep(picture: Path, name: str) -> None:
        folder = DEV / "reports" / "screens"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy2(picture, folder / f"{name}.png")
        if os.environ.get("ZIPLORA_PUBLISH"):
            image = Image.open(picture).convert("RGB")
            image = image.crop(
                tuple(
                    round(at)
                    for at in (  # what the view leaves free around a graph
                        0.11 * image.width,
                        0.06 * image.height,
                        0.89 * image.width,
                        0.94 * image.height,
                    )
                )
            )
            image.resize((1800, round(1800 * image.height / image.width)), Image.Resampling.LANCZOS).save(
                ROOT / "docs" / f"{name}.jpg", quality=88
            )

    return keep


@pytest.fixture
def frontend(browser: Browser, server: ComfyServer) -> Iterator[Frontend]:
    """A fresh page of the frontend, ready for a graph. A script error on the page fails the test."""
    from devhost.frontend import Frontend

    opened = Frontend(browser, server)
    yield opened
    opened.close()
    assert not opened.errors, f"the page threw: {opened.errors}"
