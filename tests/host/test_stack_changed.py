"""A file behind a LoRA stack that is overwritten under its old name is read again, once, by whatever has read it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from graphs import BASE, Concept, node
from safetensors.torch import load_file

from devhost.base import CHECKPOINT
from devhost.server import ComfyServer

STACKER = """
class Stacker:
    RETURN_TYPES, FUNCTION, CATEGORY = ("LORA_STACK",), "stack", "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"names": ("STRING", {})}}

    def stack(self, names):
        return ([(name, 1.0, 1.0) for name in names.split(",")],)


NODE_CLASS_MAPPINGS = {"TestLoRAStacker": Stacker}
"""


def test_a_changed_file_is_read_again_once(
    fresh_server: Callable[..., ComfyServer], tmp_path: Path, concepts: dict[str, list[Concept]]
) -> None:
    pack = tmp_path / "stacker"
    pack.mkdir()
    (pack / "__init__.py").write_text(STACKER, encoding="utf-8")
    server = fresh_server(packs=[pack])
    folder = server.base / "models" / "loras"
    subject, style, other = concepts["content"][0].lora, concepts["style"][0].lora, concepts["content"][1].lora
    name = server.put_lora((folder / subject).resolve(), "mine.safetensors")
    none = {
        f"{role}_{what}": said for role in ("subject", "style") for what, said in (("lora", "[None]"), ("prompt", ""))
    }
    graph = {
        "checkpoint": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT),
        "stack": node("TestLoRAStacker", names=f"{name},{style}"),
        "loaded": node("LoadLoRAStack", lora_stack=["stack", 0], roles="subject, style"),
        "merge": node("DirectMergeLoRA", model=BASE, lora_pair=["loaded", 0], method="sum"),
        "saved": node("SaveZippedLoRA", zipped_lora=["merge", 0], filename_prefix="merge"),
        "zip": node(
            "ZipLoRAs", model=BASE, clip=["checkpoint", 1], lora_stack=["stack", 0], quality="fast", seed=0, **none
        ),
        "zip_saved": node("SaveZippedLoRA", zipped_lora=["zip", 2], filename_prefix="zip"),
    }
    ours = {"loaded", "merge", "saved", "zip", "zip_saved"}
    assert ours <= set(server.run(graph).executed)
    unchanged = server.run(graph)
    assert ours <= set(unchanged.cached), "without a change nothing runs again"
    before = load_file(folder / name)
    server.put_lora((folder / other).resolve(), name)
    assert any((tensor != load_file(folder / name)[key]).any() for key, tensor in before.items())
    changed = server.run(graph)  # saving refuses files that are no longer what was read
    assert ours <= set(changed.executed)
    assert ours <= set(server.run(graph).cached)
