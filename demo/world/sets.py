"""The emoji sets: which packages, whose, under which licence; fetched through npm and checked by their hashes.

The JSON of a package holds SVG bodies by name. Sets under share-alike licences (`openmoji`, `emojione-v1`) are left
out, since rendered pictures ship.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import importlib
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

DEV = Path(__file__).resolve().parent.parent.parent / ".dev"
CACHE = DEV / "art"  # everything downloaded, drawn or trained that git does not track
DRAWER = "resvg_py==0.5.0"


@dataclasses.dataclass(frozen=True)
class EmojiSet:
    """One npm package: `word` names its style in prompts."""

    name: str
    word: str
    version: str
    integrity: str  # of npm's registry: sha512 of the archive
    licence: str
    author: str
    one_color: bool = False  # black on nothing: needs a light ground

    @property
    def package(self) -> str:
        return f"@iconify-json/{self.name}"

    @property
    def archive(self) -> str:
        return f"iconify-json-{self.name}-{self.version}.tgz"


SETS: dict[str, EmojiSet] = {
    s.word: s
    for s in (
        EmojiSet(
            "noto",
            "noto",
            "1.2.9",
            "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
            "Apache-2.0",
            "Google Inc",
        ),
        EmojiSet(
            "noto-v1",
            "blob",
            "1.2.5",
            "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
            "Apache-2.0",
            "Google Inc",
        ),
        EmojiSet(
            "fluent-emoji",
            "fluent",
            "1.2.7",
            "D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
            "MIT",
            "Microsoft Corporation",
        ),
        EmojiSet(
            "fluent-emoji-flat",
            "flat",
            "1.2.6",
            "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
            "MIT",
            "Microsoft Corporation",
        ),
        EmojiSet(
            "twemoji",
            "twemoji",
            "1.2.5",
            "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
            "CC-BY-4.0",
            "Twitter",
        ),
        EmojiSet(
            "emojione",
            "emojione",
            "1.2.3",
            "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
            "CC-BY-4.0",
            "Emoji One",
        ),
        EmojiSet(
            "emojione-monotone",
            "monotone",
            "1.2.1",
            "cZSNcPsuiAD6HCzCh/2dYKGh3pNI0jJlxBxQWfC33cQsPtqYZqulGBvlkThXYNvDl8VxgVHT9u+izyX/yeEIkA==",
            "CC-BY-4.0",
            "Emoji One",
            one_color=True,
        ),
        EmojiSet(
            "fxemoji",
            "firefox",
            "1.2.2",
            "UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
            "Apache-2.0",
            "Mozilla",
        ),
        EmojiSet(
            "fluent-emoji-high-contrast",
            "contrast",
            "1.2.6",
            "esqhZPpkrF7sNX3NsLoh8KW64okEr/bzko7WNnFP+qTJGAqDPDYjp0925yxuivXy3HtVQB8xhIKu3+Nq1byX5w==",
            "MIT",
            "Microsoft Corporation",
            one_color=True,
        ),
        EmojiSet(
            "streamline-emojis",
            "streamline",
            "1.2.4",
            "iNr9T9XuZVTyQPJO8ZlLxBzPkpi7qMl+z1l0C31vpEMqhPMelth3n7CeWQYtixdetDPdI81yeG4ROqjWpYJE6A==",
            "CC-BY-4.0",
            "Streamline",
        ),
    )
}

# Whole sets that the base never sees: styles to merge.
NEW_SETS = ("streamline", "contrast")
BASE_SETS = tuple(word for word in SETS if word not in NEW_SETS)


class ArtError(RuntimeError):
    """A set cannot be had as pinned; the message says which and what to do."""


def fetch(folder: Path = CACHE / "packages") -> None:
    """Downloads what is missing with `npm pack` and checks every archive. ArtError where a hash differs."""
    folder.mkdir(parents=True, exist_ok=True)
    for emoji in SETS.values():
        path = folder / emoji.archive
        if not path.is_file():
            try:
                command = ["npm", "pack", "--silent", f"{emoji.package}@{emoji.version}"]
                subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
            except (OSError, subprocess.CalledProcessError) as error:
                raise ArtError(f"npm could not fetch {emoji.package}@{emoji.version}: {error}") from error
        check(path, emoji)


def check(path: Path, emoji: EmojiSet) -> None:
    """ArtError where an archive is not the pinned one."""
    found = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if found != emoji.integrity:
        raise ArtError(f"{path} has sha512 {found}, expected {emoji.integrity}: delete it and fetch it again")


@functools.cache
def _icons(path: Path) -> dict[str, Any]:
    with tarfile.open(path) as archive:
        file = archive.extractfile("package/icons.json")
        assert file is not None
        return dict(json.load(file))


def svg(word: str, icon: str, folder: Path = CACHE / "packages") -> str | None:
    """The SVG of an icon in the set of that word, aliases followed; None where the set lacks it."""
    data = _icons(folder / SETS[word].archive)
    aliases = data.get("aliases", {})
    while icon in aliases and icon not in data["icons"]:
        icon = aliases[icon]["parent"]
    if icon not in data["icons"]:
        return None
    entry = data["icons"][icon]
    left, top = entry.get("left", data.get("left", 0)), entry.get("top", data.get("top", 0))
    width, height = entry.get("width", data.get("width", 16)), entry.get("height", data.get("height", 16))
    body = entry["body"].replace("currentColor", "#1b1b1f")
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{body}</svg>'
    )


def drawer() -> Any:
    """The module that draws SVG, installed beside the cache on first use (it is no dependency of anything else)."""
    folder = CACHE / "python"
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    try:
        import resvg_py
    except ImportError:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), DRAWER]
        subprocess.run(command, check=True, env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"})
        importlib.invalidate_caches()
        import resvg_py
    return resvg_py
