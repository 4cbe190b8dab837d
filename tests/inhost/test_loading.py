"""The pack as ComfyUI loads it."""

from __future__ import annotations

import asyncio
from types import ModuleType


def test_entry_point_lists_nodes_with_documented_sockets(pack: ModuleType) -> None:
    extension = asyncio.run(pack.comfy_entrypoint())
    nodes = asyncio.run(extension.get_node_list())
    assert {"LoadLoRAPair", "ZipLoRAOptimize", "StyleStrength", "ApplyZippedLoRA"} <= {
        node.define_schema().node_id for node in nodes
    }
    for node in nodes:
        schema = node.define_schema()
        assert schema.category == "ZipLoRA", schema.node_id
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
