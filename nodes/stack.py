"""LoadLoRAStack: any number of LoRAs, as other packs' stackers list them, to be zipped."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from .bridge.lora import reads, stack
from .schema import Schema
from .sockets import LoRAPairSocket, LoRAStackSocket


class LoadLoRAStack(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        return Schema(
            node_id="LoadLoRAStack",
            display_name="Load LoRA Stack",
            category="ZipLoRA",
            search_aliases=["more loras", "many loras"],
            description="Loads the LoRAs of a LORA_STACK, one or many, of the same base model, to be zipped.",
            inputs=[
                LoRAStackSocket.Input(
                    "lora_stack",
                    tooltip="From any pack's LoRA stacker: a list of file, model strength and clip strength.",
                ),
                io.String.Input(
                    "roles",
                    default=stack.ROLES,
                    tooltip="What each LoRA of the stack is, in its order: subject, style or other, with commas "
                    "between. Those that are not named are other.",
                ),
            ],
            outputs=[
                LoRAPairSocket.Output(
                    display_name="lora_pair", tooltip="All LoRAs, for ZipLoRA Optimize and Direct Merge LoRA."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_) -> int:
        return reads.changes()

    @classmethod
    def execute(cls, lora_stack, roles: str) -> io.NodeOutput:
        return io.NodeOutput(stack.load(lora_stack, roles))
