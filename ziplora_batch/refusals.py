"""What a server says of a prompt that it does not accept."""

from __future__ import annotations

from typing import Any


def words(answer: dict[str, Any]) -> str:
    """Why, in one line."""
    found = [
        f"{node['class_type']} ({key}): {_sentence(error)}"
        for key, node in (answer.get("node_errors") or {}).items()
        for error in node["errors"]
    ]
    error = answer.get("error") or {}
    text = str(error.get("message", error or "")) if isinstance(error, dict) else str(error)
    return ("; ".join(dict.fromkeys(found)) or text or "it does not say why")[:1000]


def _sentence(error: dict[str, Any]) -> str:
    """A node's own words alone, without the name of the input that they were said about."""
    if error.get("type") == "custom_validation_failed":
        return str(error["details"]).partition(" - ")[2] or str(error["details"])
    return f"{error['message']}: {error['details']}"
