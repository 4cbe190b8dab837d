"""A short prompt from the tag counts that kohya's scripts, and trainers after their form, leave in a LoRA's header."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

NEARLY_ALL = 0.9  # of a folder's pictures
_MOST_TAGS = 4
_LONGEST_TAG = 40  # characters: more is a sentence of one caption
_OF_ANY_PICTURE = re.compile(  # tags of quality, which say nothing of a concept
    "masterpiece|(?:best|amazing|high) quality|very aesthetic|(?:high|absurd)res|score_[0-9](?:_up)?"
)


def prompt(metadata: Mapping[str, Any]) -> str:
    """The words of the folder that a LoRA learned most of, and the tags on nearly all of its pictures; "" without any.

    ss_tag_frequency maps each folder of pictures to its tags, each with the number of captions that hold it (in lower
    case); ss_dataset_dirs says how many pictures a folder has, and how often each was repeated; ss_datasets says the
    class words, and the prefix of every caption, of folders that a table of settings names.

    Of several folders that one counts of which most pictures, repeated, were seen; folders of regularization pictures
    never. Its words are what follows the number in its name ("10_sks dog") or its class words, with its prefix. Where
    pictures have captions, the trainer uses these in the place of the folder's words: so words that no tag has one of
    are left out, unless there is no other. Added are at most four tags that stand on nine in ten pictures, the most
    frequent first, then as captions have them, without tags of mere quality, without sentences, and without what
    another part already says. Where the number of pictures is not known, the most frequent tag's count stands for it,
    unless no tag of several was written twice.
    """
    regular = _table(metadata.get("ss_reg_dataset_dirs"))
    counted = {
        name: {tag.strip().lower(): n for tag, n in tags.items() if tag.strip() and _is_count(n)}
        for name, tags in _table(metadata.get("ss_tag_frequency")).items()
        if isinstance(tags, dict) and name not in regular
    }
    if not counted:
        return ""
    folders, settings = _table(metadata.get("ss_dataset_dirs")), _settings(metadata.get("ss_datasets"))

    def seen(name: str) -> float:
        return _pictures(folders.get(name), counted[name]) * _count(folders.get(name), "n_repeats", 1)

    name = max(counted, key=seen)
    tags = counted[name]
    usual = _usual(tags, folders.get(name))
    words = _folder_words(name, settings.get(name, {}))
    if usual and words and not any(set(_split(words)) & set(_split(tag)) for tag in tags):
        words = ""
    prefix = settings.get(name, {}).get("caption_prefix")
    parts = [prefix.strip(" ,") if isinstance(prefix, str) else "", words, *usual]
    return ", ".join(_distinct([part for part in parts if part]))


def _pictures(folder: Any, tags: Mapping[str, float]) -> float:
    return _count(folder, "img_count", max(tags.values(), default=1))


def _count(folder: Any, key: str, otherwise: float) -> float:
    count = folder.get(key) if isinstance(folder, dict) else None
    return float(count) if count is not None and _is_count(count) else otherwise


def _usual(tags: Mapping[str, float], folder: Any) -> list[str]:
    pictures = _pictures(folder, tags)
    if not isinstance(folder, dict) and pictures == 1 < len(tags):
        return []
    often = [tag for tag, n in tags.items() if n >= NEARLY_ALL * pictures and len(tag) <= _LONGEST_TAG]
    often = sorted((tag for tag in often if not _OF_ANY_PICTURE.fullmatch(tag)), key=lambda tag: -tags[tag])
    return often[:_MOST_TAGS]


def _folder_words(name: str, settings: Mapping[str, Any]) -> str:
    said = settings.get("class_tokens")
    if isinstance(said, str) and said.strip():
        return said.strip()
    numbered = re.fullmatch(r"\d+_(.+)", name.strip(), re.DOTALL)
    return numbered[1].replace("_", " ").strip() if numbered else ""


def _distinct(parts: list[str]) -> list[str]:
    """Without parts whose words another one has all of: the first of two that have the same."""
    split = [set(_split(part)) for part in parts]
    return [
        part
        for place, part in enumerate(parts)
        if split[place]
        and not any(
            split[place] < other or (split[place] == other and before < place) for before, other in enumerate(split)
        )
    ]


def _split(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower().replace("_", " "))


def _is_count(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e12


def _table(said: Any) -> dict[str, Any]:
    """A table that a header holds as JSON; an empty one for anything else."""
    found = parsed(said)
    return found if isinstance(found, dict) else {}


def _settings(said: Any) -> dict[str, Mapping[str, Any]]:
    """Settings of each folder, by its name, out of ss_datasets: a list of datasets with a list of subsets each."""
    found = parsed(said)
    datasets = [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
    lists = [entry["subsets"] for entry in datasets if isinstance(entry.get("subsets"), list)]
    subsets = [subset for subsets in lists for subset in subsets if isinstance(subset, dict)]
    return {subset["image_dir"]: subset for subset in subsets if isinstance(subset.get("image_dir"), str)}


def parsed(said: Any) -> Any:
    """What a text says as JSON; None for what is no text or no JSON, or is nested past reading."""
    try:
        return json.loads(said) if isinstance(said, str) else None
    except (ValueError, RecursionError):
        return None
