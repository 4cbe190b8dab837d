"""What a LoRA file and the files beside it say of its use: a prompt, a base model, a strength."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from . import families, tag_counts
from .tag_counts import parsed

LONGEST = 300  # characters of a prompt
_MOST_WORDS = 6
_LARGEST_STRENGTH = 10.0  # of the nodes' own ranges

_PROMPTS = (  # names in a header: the specification's first, then what trainers and sites are seen to write
    "modelspec.trigger_phrase",
    "trigger_phrase",
    "ss_trigger_words",
    "trigger_words",
    "trigger_word",
    "instance_prompt",
    "ss_instance_prompt",
    "ziplora_prompt",  # Train Concept LoRA's and UnZip LoRA's
)
_BASES = ("ss_base_model_version", "modelspec.architecture", "ss_base_model", "base_model")
_PROMPTS_BESIDE = ("activation text", "trainedWords", "TrainedWords", "trigger_words", "instance_prompt")
_BASES_BESIDE = ("baseModel", "BaseModel", "base_model", "sd version")
_NOT_KNOWN = ("", "unknown", "other", "none", "undefined", "null", "n/a")
# What a text has that tells of a LoRA instead of being its trigger words.
_NO_END = (
    "".join(rf"(?<!\b{short})" for short in "st mr mrs ms dr jr sr vs mt no vol ft feat".split()) + r"(?<!\b[^\W\d])"
)
_PROSE = re.compile(
    rf"\w{_NO_END}\.['\"’”)]*\s+\w"  # a sentence, and another one; names have a "!" in them, as Love Live! has
    r"|[。！？]\s*\w|https?://|\bwww\.|\w@\w|©|\b(?:please|licen[cs]e[ds]?|copyright)\b"
    r"|\btrained (?:by|on|with|for|at|using)\b",
    re.IGNORECASE,
)
_LONGEST_CLAUSE = 20  # words without a comma between: more is a sentence
_HTML = (
    "a|abbr|article|audio|b|big|blockquote|body|br|button|center|code|dd|del|details|div|dl|dt|em|embed|figcaption|"
    "figure|font|footer|form|h[1-6]|head|header|hr|html|i|iframe|img|input|ins|kbd|li|link|mark|meta|nav|ol|p|picture|"
    "pre|s|samp|script|section|small|span|strike|strong|sub|summary|sup|svg|table|tbody|td|tfoot|th|thead|tr|tt|u|ul|"
    "video|wbr"
)
# Not other words in angle brackets, which are trigger words themselves: `<sks>`, `<s0><s1>`.
_MARKUP = re.compile(
    rf"<(?:(?:lora|lyco|hypernet):[^<>]*|/?(?:{_HTML})(?:[\s/][^<>]*)?|!--[^<>]*--|\w+[\s/][^<>=]*=[^<>]*)>",
    re.IGNORECASE,
)
_HINTS = (
    r"(?:trigger|activation)(?: ?words?| ?phrases?| ?tokens?| ?tags?)?(?: is| are)? ?[:=] ?(.+)",
    r"(?:trigger|key) ?words?(?: is| are)? ?[:=]? ?['\"‘“](.+?)['\"’”]",
)


@dataclass(frozen=True)
class Triggers:
    """What is known of a LoRA without its tensors.

    prompt: what to write to use it, "" where nothing is known. source: where that stands, such as
    "modelspec.trigger_phrase" or "civitai.info", "" where there is no prompt. base_model: as the file says, or "".
    family: of base_model, by the names of `formats.looks_like` ("SDXL", "SD 1.5", "Flux", …), "" where unknown.
    thumbnail: path of a picture beside the file. strength: the weight that a file beside it prefers. notes: what could
    not be read, in sentences. line: of SDXL, such as "Pony"; "" for SDXL itself and where none is known. listed:
    whether there is such a file.
    """

    prompt: str = ""
    source: str = ""
    base_model: str = ""
    family: str = ""
    thumbnail: str | None = None
    strength: float | None = None
    notes: tuple[str, ...] = ()
    line: str = ""
    listed: bool = True


def known(metadata: Mapping[str, Any], beside: Mapping[str, Any]) -> Triggers:
    """What a file's header and the files beside it say; thumbnail and notes are the caller's. Raises nothing.

    metadata: the header's `__metadata__`. beside: kind of file ("civitai.info", "txt", …) -> its text or its parsed
    JSON; the first that says something counts, tables before the header, since people and sites keep them up to date.
    A plain text, which may as well be a note to read, comes after the header's explicit phrases.

    In a header an explicit phrase comes before a usage hint that names one, and both before tag counts. Of the base
    model, ss_sd_model_name (the checkpoint's file) says only the line: trainers write SDXL for all of its lines.
    """
    source, prompt = next(((source, said) for source, said in _prompts(metadata, beside) if said), ("", ""))
    base = _base_model(metadata, beside)
    family = families.family(base)
    strength = next((n for n in map(_strength, beside.values()) if n is not None), None)
    lines = (base, _short(metadata.get("ss_sd_model_name"))) if family in ("SDXL", "") else ()
    line = next(filter(None, map(families.line, lines)), "")
    return Triggers(prompt, source, base, family or ("SDXL" if line and not base else ""), None, strength, (), line)


def _base_model(metadata: Mapping[str, Any], beside: Mapping[str, Any]) -> str:
    """What a site's file says, which tells lines apart; else the first name of a known family in the header."""
    said = [said for said in _bases_beside(beside) if said.lower() not in _NOT_KNOWN]
    header = [said for said in (_short(metadata.get(key)) for key in _BASES) if said.lower() not in _NOT_KNOWN]
    return next(iter([*said, *filter(families.family, header), *header]), "")


def _prompts(metadata: Mapping[str, Any], beside: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for kind, found in beside.items():
        for table in _tables(found):
            for key in _PROMPTS_BESIDE:
                yield kind, _words(table.get(key))
    for key in _PROMPTS:
        yield key, _words(metadata.get(key))
    for kind, found in beside.items():
        if isinstance(found, str) and not is_prose(found):
            yield kind, _prompt(found)
    hint = _prompt(metadata.get("modelspec.usage_hint"))
    found = next(filter(None, (re.search(pattern, hint, re.IGNORECASE) for pattern in _HINTS)), None)
    yield "modelspec.usage_hint", _prompt(found[1].strip(" '\"‘’“”.")) if found else ""
    yield "ss_tag_frequency", _prompt(tag_counts.prompt(metadata))


def _tables(found: Any) -> list[Mapping[str, Any]]:
    """The tables of a file beside a LoRA that say something of it: itself, and what LoRA Manager keeps of Civitai."""
    tables = (found, found.get("civitai")) if isinstance(found, dict) else ()
    return [table for table in tables if isinstance(table, dict)]


def _bases_beside(beside: Mapping[str, Any]) -> list[str]:
    """In the order of the keys: what AUTOMATIC1111's page lets users choose from comes last, as it is coarse."""
    tables = [table for found in beside.values() for table in _tables(found)]
    return [_short(table.get(key)) for key in _BASES_BESIDE for table in tables]


def _short(said: Any) -> str:
    """A name of a base model: the first of a list."""
    said = said[0] if isinstance(said, list) and said else said
    return " ".join(_printable(said[:300]).split())[:120] if isinstance(said, str) else ""


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def _prompt(said: Any) -> str:
    """A text as a prompt: in one line, without HTML and `<lora:…>`, cut at a comma or a space where it is long."""
    if not isinstance(said, str):
        return ""
    text = _MARKUP.sub(" ", html.unescape(said[: 20 * LONGEST]))
    text = re.sub(r"\s*,[\s,]*", ", ", " ".join(_printable(text).split())).strip(" ,;")
    if text.lower() in _NOT_KNOWN:
        return ""
    if len(text) > LONGEST:
        head = text[:LONGEST]
        text = head.rpartition(",")[0] or head.rpartition(" ")[0] or head
    return text.strip(" ,;")


def is_prose(text: str) -> bool:
    """Whether a text beside a LoRA reads as sentences, such as a license, and not as words to write in a prompt."""
    text = _MARKUP.sub(" ", text[: 20 * LONGEST])
    clauses = re.split(r"[,;\n]", text)
    return bool(_PROSE.search(text)) or any(len(clause.split()) > _LONGEST_CLAUSE for clause in clauses)


def _words(said: Any) -> str:
    """Trigger words as a prompt: a text, a list of texts (also one as JSON), or rgthree's list of {"word": text}.

    Words of a list are joined. Entries with commas are prompts of their own, one for each outfit or scene, of which
    together nothing can be drawn: then the first counts.
    """
    if isinstance(said, str) and said.lstrip().startswith("["):
        said = parsed(said) or said
    if not isinstance(said, list):
        return _prompt(said)
    entries = (entry.get("word") if isinstance(entry, dict) else entry for entry in said[:100])
    words = list(dict.fromkeys(filter(None, map(_prompt, entries))))
    if any("," in word for word in words):
        return words[0]
    return _prompt(", ".join(words[:_MOST_WORDS]))


def _strength(found: Any) -> float | None:
    """The weight that a file beside a LoRA prefers; 0 stands for none there."""
    for table in _tables(found):
        tips = table.get("usage_tips")
        tips = parsed(tips) if isinstance(tips, str) else tips
        for said in (table.get("preferred weight"), tips.get("strength") if isinstance(tips, dict) else None):
            number = _number(said)
            if number is not None and 0 < abs(number) <= _LARGEST_STRENGTH:
                return number
    return None


def _number(said: Any) -> float | None:
    if isinstance(said, bool) or not isinstance(said, int | float | str):
        return None
    try:
        number = float(said if not isinstance(said, str) else said[:20])
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def front_matter(text: str) -> dict[str, str]:
    """instance_prompt and base_model of a model card as diffusers' training scripts write it, from its YAML head.

    A line each, also with the first entry of a list below it; anything else of YAML is passed over.
    """
    head = re.match(r"\ufeff?---[ \t]*\n(.*?)\n---", text, re.DOTALL)
    found = {}
    for key in ("instance_prompt", "base_model"):
        said = re.search(rf"^{key}:[ \t]*(?:\n[ \t]*-[ \t]+)?([^\n]+)$", head[1] if head else "", re.MULTILINE)
        if said and not said[1].startswith(("|", ">", "- ")):
            found[key] = said[1].strip().strip("'\"")
    return found
