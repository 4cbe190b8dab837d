"""The real frontend in a headless Chromium, on the server that the session shares."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from devhost.frontend import Frontend
    from devhost.server import ComfyServer


@pytest.fixture(scope="session")
def session_server(make_server: Callable[..., ComfyServer]) -> ComfyServer:
    """Its encoders compute in float32: in half precision, the host's choice, many processors take minutes a picture."""
    return make_server("--fp32-text-enc")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless Chromium."""
    from devhost.frontend import open_browser

    with open_browser() as opened:
        yield opened


PUBLISH = bool(os.environ.get("ZIPLORA_PUBLISH"))  # write the README's and the help pages' pictures
SAVED_AS: dict[str, dict[str, Any]] = {".jpg": {"optimize": True, "progressive": True}, ".webp": {"method": 6}}


@pytest.fixture
def kept() -> Callable[..., None]:
    """Keep a screenshot as a test artefact, and when publishing as a picture of that width in the checkout.

    edges: the part of width and of height that is cut off on each side. quality: the file's.
    """
    from PIL import Image

    from devhost.host import DEV, ROOT

    def keep(
        picture: Path, name: str, publish: str, width: int, edges: tuple[float, float] = (0, 0), quality: int = 62
    ) -> None:
        folder = DEV / "reports" / "screens"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy2(picture, folder / f"{name}.png")
        if PUBLISH:
            image = Image.open(picture).convert("RGB")
            left, top = (round(edge * side) for edge, side in zip(edges, image.size, strict=True))
            image = image.crop((left, top, image.width - left, image.height - top))
            size = (width, round(width * image.height / image.width))
            (ROOT / publish).parent.mkdir(parents=True, exist_ok=True)
            how = SAVED_AS[Path(publish).suffix]
            image.resize(size, Image.Resampling.LANCZOS).save(ROOT / publish, **how, quality=quality)

    return keep


@pytest.fixture(scope="session")
def page_of_all(browser: Browser, session_server: ComfyServer) -> Iterator[Frontend]:
    from devhost.frontend import Frontend

    opened = Frontend(browser, session_server)
    yield opened
    opened.close()


@pytest.fixture
def shared_frontend(page_of_all: Frontend, server: ComfyServer) -> Iterator[Frontend]:
    """One page for all tests that only load graphs and look at them. A script error on it fails the test."""
    page_of_all.errors.clear()
    yield page_of_all
    assert not page_of_all.errors, f"the page threw: {page_of_all.errors}"


@pytest.fixture
def frontend(browser: Browser, server: ComfyServer) -> Iterator[Frontend]:
    """A fresh page of the frontend, ready for a graph. A script error on the page fails the test."""
    from devhost.frontend import Frontend

    opened = Frontend(browser, server)
    yield opened
    opened.close()
    assert not opened.errors, f"the page threw: {opened.errors}"
