"""SparsifyLoRA: the largest elements of a LoRA alone."""

from __future__ import annotations

import folder_paths
from comfy_api.v0_0_2 import io

from .bridge.lora import loras
from .bridge.sparse import sparsify
from .inputs import connected
from .schema import Schema
from .sockets import LoRAModelSocket


class SparsifyLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        return Schema(
            node_id="SparsifyLoRA",
            display_name="Sparsify LoRA",
            category="ZipLoRA/files",
            search_aliases=["prune lora", "shrink lora"],
            description="Keeps the largest elements of each of a LoRA's updates and sets the rest to zero, as the "
            "ZipLoRA paper does to show how few of them matter.",
            inputs=[
                io.Model.Input("model", tooltip="The base model. Nothing is computed on it."),
                io.Combo.Input(
                    "lora", options=folder_paths.get_filename_list("loras"), tooltip="The LoRA file to thin out."
                ),
                io.Float.Input(
                    "keep",
                    default=10.0,
                    min=0.01,
                    max=100.0,
                    step=1.0,
                    round=False,
                    tooltip="Percent of each layer's elements to keep, the largest: the paper shows 100, 20 and 10.",
                ),
            ],
            outputs=[
                LoRAModelSocket.Output(
                    display_name="lora", tooltip="The thinned LoRA, for Load LoRA Model or Save LoRA Weights."
                ),
                io.String.Output(display_name="report", tooltip="How much of the LoRA is left, and how large it is."),
            ],
        )

    @classmethod
    def validate_inputs(cls, lora: str | None) -> bool | str:
        return (lora is not None and loras.check(lora)) or True

    @classmethod
    def fingerprint_inputs(cls, lora: str | None, **_):
        return None if lora is None else loras.fingerprint(lora)

    @classmethod
    def execute(cls, model, lora: str, keep: float) -> io.NodeOutput:
        connected(model=model)
        return io.NodeOutput(*sparsify(model, lora, keep))
