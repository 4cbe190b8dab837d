"""Texts and help pages in every language: nothing missing, nothing left in English, nothing that says less than it.

A language is a folder of `locales/`. What a failure names is what that language still needs; English comes first
(`python3 dev.py workflows` for the texts of nodes).
"""

from __future__ import annotations

import ast
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from devhost import languages, snapshot
from devhost.base import NODES
from devhost.host import ROOT
from devhost.languages import ENGLISH, LANGUAGES, TRANSLATIONS

CODE = re.compile(r"`([^`]+)`")
BOLD = re.compile(r"\*\*(.+?)\*\*")
EMPHASIS = re.compile(r"(?<!\*)(\*{1,2})(?![\s*])(.+?)(?<![\s*])\1(?!\*)")
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e-\d+)?")
EXAMPLE = re.compile(r"(?<![\w])'([^']+)'(?!\w)")  # in tooltips: what a prompt might be
QUOTED = re.compile(r"['‘“「\"][^'’”」\"]*['’”」\"]")
ENGLISH_WORDS = re.compile(r"[A-Za-z][A-Za-z'-]*(?: [A-Za-z][A-Za-z'-]*){3,}")  # four in a row
KIND = re.compile(r"(#+ |\s*- |\d+\. |!\[)?")  # of a line of a help page
NAMES = {"NP-LoRA", "TIES", "DARE", "KnOTS", "TSV-Merge", "SVD"}
SAME_EVERYWHERE = {"fp16", "bf16", "fp32", "kohya", "diffusers", *NAMES}


def texts_of(entry: Mapping[str, Any]) -> dict[str, str]:
    """Place -> text, of one node of a locale file."""
    sockets = {f"{kind} {k}": v for kind in ("inputs", "outputs") for k, v in entry[kind].items()}
    named = {f"{where}: {what}": text for where, said in sockets.items() for what, text in said.items()}
    return {"display_name": entry["display_name"], "description": entry["description"], **named}


def scripts(text: str) -> Counter[str]:
    """How many letters of each script, by the first word of their Unicode names: LATIN, HANGUL, HIRAGANA, CJK."""
    found = (re.split(r"[ -]", unicodedata.name(letter, "?"))[0] for letter in text if letter.isalpha())
    return Counter("CJK" if script == "IDEOGRAPHIC" else script for script in found)  # the sign for a doubled kanji


def script_of(language: str) -> str:
    """The script that tells a language from others: the most common in its descriptions but for names in Latin."""
    found = scripts("".join(entry["description"] for entry in languages.node_texts(language).values()))
    found.pop("LATIN" if len(found) > 1 else "", None)
    return found.most_common(1)[0][0]


def left_in_english(text: str, english: str) -> list[str]:
    """Four or more words in a row that the English text has too, but for code, examples and what is stressed."""
    for known in (CODE, BOLD, EMPHASIS, QUOTED):
        text = known.sub("|", text)
    return [words for words in ENGLISH_WORDS.findall(text) if words in english]


def contract() -> dict[str, Any]:
    return json.loads(snapshot.CONTRACT.read_text(encoding="utf-8"))


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_input_and_output_has_its_texts(language: str) -> None:
    found, english = languages.node_texts(language), languages.node_texts(ENGLISH)
    missing = [node for node in NODES if node not in found]
    for node in NODES:
        said, meant = texts_of(found[node]) if node in found else {}, texts_of(english[node])
        missing += [f"{node}, {place}" for place in meant if said and not said.get(place, "").strip()]
        missing += [f"not there any more: {node}, {place}" for place in said if place not in meant]
    assert not missing, f"locales/{language}/nodeDefs.json"
    assert list(found) == list(english) == list(NODES)


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_text_holds_the_frontends_own_syntax(language: str) -> None:
    """Vue I18n reads a plural, a link or a variable out of these, and shows another text, or none."""
    said = {node: texts_of(entry) for node, entry in languages.node_texts(language).items()}
    assert not [(node, place) for node, of in said.items() for place, text in of.items() if set(text) & set("{}@$|")]


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_texts_of_nodes_are_translated_and_say_as_much(language: str) -> None:
    found, english = languages.node_texts(language), languages.node_texts(ENGLISH)
    script, wrong = script_of(language), []
    for node, entry in found.items():
        said = texts_of(entry)
        for place, meant in texts_of(english[node]).items():
            text = said.get(place, "")
            if place.endswith("tooltip") or place == "description":
                lacks = {*NUMBER.findall(meant)} - {*NUMBER.findall(text)}
                lacks |= {example for example in EXAMPLE.findall(meant) if example not in text}
                if not scripts(text)[script] or left_in_english(text, meant) or lacks:
                    wrong.append((node, place, text, lacks))
    assert not wrong
    names = [entry["display_name"] for entry in found.values()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_no_text_is_another_languages(language: str) -> None:
    """What a copied line would show: letters that the language's other texts have none of, or hardly any."""
    found = languages.node_texts(language)
    everything = scripts("".join(text for entry in found.values() for text in texts_of(entry).values()))
    strange = {script for script, count in everything.items() if count < everything.total() / 100} - {"GREEK"}
    shown = {
        f"{node} {place}": text
        for node, entry in found.items()
        for place, text in texts_of(entry).items()
        if strange & scripts(text).keys()
    }
    assert not shown


def choices() -> Iterator[tuple[str, str, str]]:
    """Node, input and value of every choice that a language names."""
    for node, said in contract().items():
        for name, spec in said["inputs"].items():
            for value in spec.get("options", ()):
                if value not in SAME_EVERYWHERE:
                    yield node, name, value
            if spec["type"] == "files" and name not in ("lora", "zipped"):  # which have to be chosen
                if (node, name) not in {("LoadLoRAPair", "content_lora"), ("LoadLoRAPair", "style_lora")}:
                    yield node, name, "[None]"


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_choices_have_names(language: str) -> None:
    named = languages.own_texts(language)["choices"]
    found = {(node, name, value) for node, of in named.items() for name, values in of.items() for value in values}
    meant = set(choices())
    assert found == meant, f"missing: {sorted(meant - found)}; no such choice: {sorted(found - meant)}"
    script = script_of(language)
    plain = [text for of in named.values() for values in of.values() for text in values.values()]
    assert all(scripts(text).keys() - {"LATIN"} for text in plain) or script == "LATIN", plain


def placeholders(name: str) -> set[str]:
    """What the schemas of a module of nodes write into empty texts."""
    tree = ast.parse((ROOT / "nodes" / name).read_text(encoding="utf-8"))
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    given = [node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "placeholder"]
    found = [constants[value.id] if isinstance(value, ast.Name) else value for value in given]
    return {ast.literal_eval(value) for value in found}


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_what_scripts_and_empty_texts_say_is_translated(language: str) -> None:
    scripts_say = {
        text
        for path in (ROOT / "web").glob("*.js")
        for text in re.findall(r"\bword\(\"([^\"]+)\"\)", path.read_text(encoding="utf-8"))
    }
    texts_say = set().union(*(placeholders(path.name) for path in (ROOT / "nodes").glob("*.py")))
    words = languages.own_texts(language)["words"]
    assert scripts_say and texts_say and words.keys() == scripts_say | texts_say
    assert all(text.strip() and text != english for english, text in words.items())


def kinds(page: str) -> list[str]:
    found = [KIND.match(line) for line in page.splitlines()]
    return [kind[0] if kind else "" for kind in found]


def said_less(line: str, meant: str, node: str, language: str) -> list[str]:
    """What a line of a help page has not of the English one: code, numbers, pictures, choices, nodes, errors."""
    english, found = languages.node_texts(ENGLISH), languages.node_texts(language)
    nodes = {english[name]["display_name"]: found[name]["display_name"] for name in found}
    values = {v for spec in contract()[node]["inputs"].values() for v in spec.get("options", ())}
    lacks = {*CODE.findall(meant)} ^ {*CODE.findall(line)}
    lacks |= {*NUMBER.findall(meant)} - {*NUMBER.findall(line)}
    lacks |= {*re.findall(r"\]\([^)]+\)", meant)} ^ {*re.findall(r"\]\([^)]+\)", line)}
    bold, stressed = BOLD.findall(meant), {*BOLD.findall(line)}
    lacks |= {nodes[name] for name in bold if name in nodes} - stressed
    lacks |= {value for _, value in EMPHASIS.findall(meant) if value in values and f"*{value}*" not in line}
    if meant.startswith("- **") and bold[0][0].islower():  # an error, which is in English everywhere
        lacks |= {name for name in bold if name[0].islower() and name != "the style"} - {*stressed}
    return sorted(lacks)


def badly_stressed(line: str) -> list[str]:
    """Stars that Markdown would show as stars: beside a letter outside, and beside punctuation inside."""
    plain = CODE.sub(lambda code: "x" * len(code[0]), line)

    def is_bad(inner: str, outer: str) -> bool:
        return bool(outer) and outer.isalnum() and not inner.isalnum()

    return [
        found[0]
        for found in EMPHASIS.finditer(plain)
        if is_bad(found[2][0], plain[: found.start()][-1:]) or is_bad(found[2][-1], plain[found.end() :][:1])
    ]


@pytest.mark.parametrize("language", TRANSLATIONS)
@pytest.mark.parametrize("node", NODES)
def test_a_help_page_says_what_the_english_one_says(node: str, language: str) -> None:
    path = languages.help_page(node, language)
    assert path.is_file(), f"{node} has no help page in {language}"
    english, page = (languages.help_page(node, of).read_text(encoding="utf-8") for of in (ENGLISH, language))
    assert page.startswith(f"# {languages.node_texts(language)[node]['display_name']}\n")
    assert kinds(page) == kinds(english), "as many lines, of the same kinds, in the same order"
    script = script_of(language)
    for line, meant in zip(page.splitlines(), english.splitlines(), strict=True):
        assert not said_less(line, meant, node, language), f"{line!r} for {meant!r}"
        assert not left_in_english(line, meant), line
        assert not badly_stressed(line), line
        titled = line.startswith("#") and (line == meant or scripts(line).keys() - {"LATIN"})  # B-LoRA is a name
        assert titled or scripts(line)[script] or not re.search("[A-Za-z]{2}", CODE.sub("", meant)), line


@pytest.mark.parametrize("language", TRANSLATIONS)
@pytest.mark.parametrize("node", NODES)
def test_a_help_page_calls_inputs_as_the_node_shows_them(node: str, language: str) -> None:
    """`seed` stands on the page as in saved graphs, with the name beside it that the node shows in this language."""
    page = languages.help_page(node, language).read_text(encoding="utf-8")
    shown = {name: said["name"] for name, said in languages.node_texts(language)[node]["inputs"].items()}
    missing = [
        f"`{name}`（{label}）"
        for name, label in shown.items()
        if label.lower() != name and not re.search(rf"`{name}`[(（]{re.escape(label)}[)）]", page)
    ]
    assert not missing


def test_what_the_tests_of_pages_would_see() -> None:
    """Each fault that they look for, in a line that has it."""
    english = "- `seed`: The same seed gives the same two LoRAs, at 0.5, with **Style Strength**."
    faults = {
        "- `seed`：同样的种子，0.5，**风格强度**。": False,
        "- `sed`：同样的种子，0.5，**风格强度**。": True,
        "- `seed`：同样的种子，**风格强度**。": True,
        "- `seed`：同样的种子，0.5，**Style Strength**。": True,
    }
    assert {line: bool(said_less(line, english, "UnZipLoRA", "zh")) for line in faults} == faults
    assert said_less("- **已更改**：重新排队。", "- **has changed since**: queue again.", "LoadZippedLoRA", "zh")
    assert left_in_english("同样：The same seed gives the same", english)
    assert not left_in_english("`a b c d e`", "a b c d e")
    assert badly_stressed("用*编码（提示词）*接")
    assert not badly_stressed("用*编码*接（*编码*）")
    assert kinds("# A\n\n- b\n  - c\n1. d\n![e](f)\ng") == ["# ", "", "- ", "  - ", "1. ", "![", ""]
    assert (script_of("zh"), script_of("ja"), script_of("ko")) == ("CJK", "HIRAGANA", "HANGUL")
