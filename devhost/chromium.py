"""Find a Chromium for the browser tests, or install one (standard library only)."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from .host import Host, SetupError
from .install import Stages, call, runs

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
APPLICATIONS = (
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    r"C:\Program Files\Google\Chrome\Application\chrome.exe",
    r"C:\Program Files (x86)\Google\Chrome\Application\chrome.exe",
)
# Below the folder that playwright keeps its own browsers in.
PLAYWRIGHT = (
    "chromium-*/chrome-linux*/chrome",
    "chromium-*/chrome-mac*/*.app/Contents/MacOS/*",
    "chromium-*/chrome-win*/chrome.exe",
)


def find_chromium() -> Path | None:
    """Path of a Chromium: CHROMIUM_PATH, then the system's, then playwright's own. SetupError for a wrong path."""
    named = os.environ.get("CHROMIUM_PATH")
    if named:
        if not Path(named).is_file():
            raise SetupError(f"CHROMIUM_PATH names {named}, which is not a file: give the path of a Chromium program.")
        return Path(named)
    found = [Path(path) for path in map(shutil.which, NAMES) if path] + [Path(path) for path in APPLICATIONS]
    for pattern in PLAYWRIGHT:
        found += sorted(playwright_folder().glob(pattern), reverse=True)
    return next((path for path in found if path.is_file() and not is_snap_stub(path)), None)


def playwright_folder() -> Path:
    named = os.environ.get("PLAYWRIGHT_BROWSERS_PATH")
    if named:
        return Path(named)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "ms-playwright"
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "ms-playwright"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ms-playwright"


def is_snap_stub(path: Path) -> bool:
    """Ubuntu ships a script of this name that only asks for a snap, and snaps do not run in containers."""
    with open(path, "rb") as handle:
        start = handle.read(4096)
    return start.startswith(b"#!") and b"snap" in start and shutil.which("snap") is None


def ensure_chromium(host: Host) -> Path:
    """A Chromium, installed if need be. SetupError says what to do where that does not work."""
    found = find_chromium()
    if found is not None:
        return found
    stages = Stages()
    stages.say("installing Chromium for the browser tests")
    reasons = []
    for command in ways_to_install(host):
        try:
            for step in command:
                call(step, "installing Chromium")
        except SetupError as error:
            reasons.append(str(error))
            continue
        found = find_chromium()
        if found is not None:
            stages.say(f"Chromium is {found}")
            return found
    raise SetupError(
        "No Chromium was found and none could be installed; install Chromium or Chrome, or name one in CHROMIUM_PATH. "
        + " ".join(reasons)
    )


def ways_to_install(host: Host) -> list[list[list[str]]]:
    """The ways that fit this system, each a list of commands, the best first."""
    ways = []
    root = sys.platform == "linux" and os.geteuid() == 0
    if root and is_debian() and shutil.which("apt-get"):
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"]
        ways.append([["apt-get", "update", "-qq"], ["env", "DEBIAN_FRONTEND=noninteractive", *install]])
    if runs(host.python, "import playwright"):
        libraries = ["--with-deps"] if root and shutil.which("apt-get") else []
        ways.append([[str(host.python), "-m", "playwright", "install", *libraries, "chromium"]])
    return ways


def is_debian() -> bool:
    """Debian proper: Ubuntu's chromium package is an empty pointer to a snap."""
    try:
        return "\nID=debian" in "\n" + Path("/etc/os-release").read_text(encoding="utf-8")
    except OSError:
        return False
