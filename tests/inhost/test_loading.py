"""The pack as ComfyUI loads it."""

from __future__ import annotations

import asyncio
from types import ModuleType

GROUPS = {"ZipLoRA", "ZipLoRA/train", "ZipLoRA/files", "ZipLoRA/compare"}  # the submenus, each with its color


def test_entry_point_lists_nodes_with_documented_sockets(pack: ModuleType) -> None:
    extension = asyncio.run(pack.comfy_entrypoint())
    nodes = asyncio.run(extension.get_node_list())
    assert {"LoadLoRAPair", "ZipLoRAOptimize", "StyleStrength", "ApplyZippedLoRA"} <= {
        node.define_schema().node_id for node in nodes
    }
    for node in nodes:
        schema = node.define_schema()
        assert schema.category in GROUPS, schema.node_id
        silent = [socket.id for socket in [*schema.inputs, *schema.outputs] if not socket.tooltip]
        assert not silent, f"{schema.node_id} has sockets without a tooltip: {silent}"


def test_pack_defines_no_v1_mappings(pack: ModuleType) -> None:
    # ComfyUI skips comfy_entrypoint where it finds these.
    assert not hasattr(pack, "NODE_CLASS_MAPPINGS")


def test_file_names_made_by_another_node_are_checked_when_they_are_known(pack: ModuleType) -> None:
    load = next(node for node in pack.nodes.NODES if node.__name__ == "LoadLoRAPair")
    assert load.validate_inputs(None, None) is True
    assert "style_lora: 'none.safetensors' is missing" in load.validate_inputs(None, "none.safetensors")
    assert load.fingerprint_inputs(None, None) == []


def test_search_words_are_told_where_newer_hosts_tell_them(pack: ModuleType) -> None:
    zip_loras = pack.nodes.zip.ZipLoRAs
    words = zip_loras.define_schema().search_aliases
    assert "combine" in words
    told = zip_loras.GET_NODE_INFO_V1()
    assert told["search_aliases"] == words
    assert told["category"] == "ZipLoRA" and "subject_lora" in told["input"]["required"]  # all else as ever
    assert pack.nodes.reference.ZipLoRAReference.GET_NODE_INFO_V1()["search_aliases"] is None


def test_a_host_with_search_words_of_its_own_is_taken_as_it_is(pack: ModuleType, monkeypatch) -> None:
    """Loaded again on a host whose schema has the argument: its own class, and no second field."""
    import importlib.util
    from dataclasses import dataclass

    from comfy_api.v0_0_2 import io

    @dataclass
    class Newer(io.Schema):
        search_aliases: list[str] | None = None

    monkeypatch.setattr(io, "Schema", Newer)
    spec = importlib.util.spec_from_file_location("schema_on_newer_host", pack.nodes.schema.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.Schema is Newer
