"""DirectMergeLoRA: training-free merges of a pair, to compare with."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..ziplora_core.direct import METHODS
from .bridge.direct import merge
from .bridge.lora.zipped import sources_of
from .inputs import connected
from .schema import Schema
from .sockets import LoRAsToZipSocket, ZippedLoRASocket


class DirectMergeLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        return Schema(
            node_id="DirectMergeLoRA",
            display_name="Direct Merge LoRA",
            category="ZipLoRA",
            search_aliases=["merge without training", "add loras"],
            description="Merges a pair at once, without pictures or prompts: to compare with a zipped pair, and "
            "wherever a zipped pair goes.",
            inputs=[
                io.Model.Input("model", tooltip="The base model, without the two LoRAs. Nothing is computed on it."),
                LoRAsToZipSocket.Input(
                    "lora_pair",
                    tooltip="The two LoRAs, from Load LoRA Pair. Bypassed (Ctrl+B), this node hands them on as they "
                    "are, and they are stacked.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default="sum",
                    tooltip=" ".join(f"{method.name}: {method.words}." for method in METHODS.values()),
                ),
            ],
            outputs=[
                ZippedLoRASocket.Output(
                    display_name="zipped_lora", tooltip="The merge, for every node that takes a zipped pair."
                )
            ],
        )

    @classmethod
    def execute(cls, model, lora_pair, method: str) -> io.NodeOutput:
        connected(model=model, lora_pair=lora_pair)
        return io.NodeOutput(merge(model, sources_of(lora_pair), method))
