"""What a server says of the nodes: the contract that saved graphs rely on, and every text in both languages."""

from __future__ import annotations

import json
import re

import pytest

from devhost import snapshot
from devhost.base import NODES, PACK
from devhost.host import ROOT
from devhost.server import ComfyServer

LANGUAGES = ("en", "zh")


def texts_of(entry: dict) -> dict[str, str]:
    """Place -> text, of one node of a locale file."""
    sockets = {f"{kind} {k}": v for kind in ("inputs", "outputs") for k, v in entry[kind].items()}
    named = {f"{where}: {what}": text for where, said in sockets.items() for what, text in said.items()}
    return {"display_name": entry["display_name"], "description": entry["description"], **named}


@pytest.fixture(scope="module")
def contract(session_server: ComfyServer) -> dict:
    """What the server says of the pack's nodes; describing all that it has takes it a while."""
    return snapshot.contract(session_server.object_info())


def test_the_contract_is_the_committed_one(contract: dict) -> None:
    """An id, type, default, range or choice that changes breaks graphs that people have saved."""
    committed = json.loads(snapshot.CONTRACT.read_text(encoding="utf-8"))
    assert contract == committed, "meant? then run `python3 dev.py workflows`"


def test_english_is_what_the_nodes_say(server: ComfyServer) -> None:
    committed = json.loads(snapshot.ENGLISH.read_text(encoding="utf-8"))
    assert snapshot.texts(server.object_info()) == committed, "run `python3 dev.py workflows`"


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_input_and_output_has_its_texts(language: str) -> None:
    found = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    english = json.loads(snapshot.ENGLISH.read_text(encoding="utf-8"))
    assert list(found) == list(english) == list(NODES)
    for node in NODES:
        said = texts_of(found[node])
        assert said.keys() == texts_of(english[node]).keys(), node
        assert all(text.strip() for text in said.values()), [place for place, text in said.items() if not text.strip()]
        if language == "zh":
            latin = [p for p, text in said.items() if p.endswith("tooltip") and not re.search(r"[\u4e00-\u9fff]", text)]
            assert not latin, f"{node} is not translated: {latin}"


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("node", NODES)
def test_every_node_has_a_help_page(server: ComfyServer, contract: dict, node: str, language: str) -> None:
    name = node if language == "en" else f"{node}/{language}"
    page = server.session.get(f"{server.url}/extensions/{PACK}/docs/{name}.md")
    assert page.ok, f"{node} has no help page in {language}"
    missing = [name for name in contract[node]["inputs"] if f"`{name}`" not in page.text]
    assert not missing, f"the help page of {node} ({language}) does not explain {', '.join(missing)}"


def test_the_server_hands_out_the_translations(server: ComfyServer) -> None:
    given = server.get("i18n")
    assert given["zh"]["nodeDefs"]["StyleStrength"]["display_name"] == "风格强度"
