"""ApplyZippedLoRA: a zipped pair on a model."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from . import inputs
from .bridge.apply import apply_once
from .schema import Schema
from .sockets import LoRAsToApplySocket


class ApplyZippedLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        return Schema(
            node_id="ApplyZippedLoRA",
            display_name="Apply Zipped LoRA",
            category="ZipLoRA",
            search_aliases=["load zip", "use zip"],
            description="Puts a zipped pair on a model, as one LoRA. Other LoRAs may go before or after it.",
            inputs=[
                io.Model.Input("model", tooltip="The base model, without the two LoRAs."),
                LoRAsToApplySocket.Input(
                    "zipped_lora",
                    tooltip="The zipped pair; or a pair that nothing has zipped, which is stacked, as by LoRA loaders "
                    "in a row.",
                ),
                inputs.strength(
                    "strength",
                    "Strength of the whole zipped pair. For style or subject alone use Style Strength.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The checkpoint's text encoder. Where a LoRA file has a text-encoder part, it is added "
                    "here as a LoRA loader does; not connected, it is left out, and the node says so.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the zipped pair."),
                io.Clip.Output(
                    display_name="clip",
                    tooltip="The text encoder with both files' parts, if connected: encode what to draw with it.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, zipped_lora, strength: float, clip=None) -> io.NodeOutput:
        inputs.connected(model=model, zipped_lora=zipped_lora, **{} if clip is None else {"clip": clip})
        return io.NodeOutput(*apply_once(model, clip, zipped_lora, strength))
