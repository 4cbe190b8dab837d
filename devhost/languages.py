"""The pack's languages: every folder of locales/ is one, and where its texts and help pages are (standard library)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .host import ROOT

ENGLISH = "en"
LANGUAGES = tuple(sorted(path.name for path in (ROOT / "locales").iterdir() if path.is_dir()))
TRANSLATIONS = tuple(language for language in LANGUAGES if language != ENGLISH)


def _read(language: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "locales" / language / name).read_text(encoding="utf-8"))
    return found


def node_texts(language: str) -> dict[str, Any]:
    """Node -> names, description and tooltips, in the form of the frontend's locale files."""
    return _read(language, "nodeDefs.json")


def own_texts(language: str) -> dict[str, Any]:
    """What the pack's scripts say (`words`, by the English) and the names of choices (`choices`, by node and input)."""
    own: dict[str, Any] = _read(language, "main.json")["ziplora"]
    return own


def help_page(node: str, language: str) -> Path:
    """The help page of a node, where the frontend looks for it."""
    pages = ROOT / "web" / "docs"
    return pages / f"{node}.md" if language == ENGLISH else pages / node / f"{language}.md"
