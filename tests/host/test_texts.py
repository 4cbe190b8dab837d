"""What a server says of the nodes: the contract that saved graphs rely on, and every text in every language."""

from __future__ import annotations

import json

import pytest

from devhost import languages, snapshot
from devhost.base import NODES, PACK
from devhost.languages import ENGLISH, LANGUAGES, TRANSLATIONS
from devhost.server import ComfyServer


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
@pytest.mark.parametrize("node", NODES)
def test_every_node_has_a_help_page(server: ComfyServer, contract: dict, node: str, language: str) -> None:
    name = node if language == ENGLISH else f"{node}/{language}"
    page = server.session.get(f"{server.url}/extensions/{PACK}/docs/{name}.md")
    assert page.ok, f"{node} has no help page in {language}"
    missing = [name for name in contract[node]["inputs"] if f"`{name}`" not in page.text]
    assert not missing, f"the help page of {node} ({language}) does not explain {', '.join(missing)}"


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_the_server_hands_out_the_translations(server: ComfyServer, language: str) -> None:
    given = server.get("i18n")[language]
    texts = languages.node_texts(language)
    assert {node: given["nodeDefs"][node] for node in texts} == texts
    assert given["ziplora"] == languages.own_texts(language)
    assert language != "zh" or given["nodeDefs"]["StyleStrength"]["display_name"] == "风格强度"
