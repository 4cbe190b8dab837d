"""FuseTextEncoders: the text encoders' halves of LoRAs, merged before the LoRAs are."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from . import inputs
from .bridge.lora.zipped import sources_of
from .bridge.text_fusion import fuse, read_prompts
from .schema import Schema
from .sockets import LoRAPairSocket, LoRAsToZipSocket


class FuseTextEncoders(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        return Schema(
            node_id="FuseTextEncoders",
            display_name="Fuse Text Encoders",
            category="ZipLoRA",
            search_aliases=["mix of show fusion", "merge text encoder lora"],
            description="Merges the text encoders' parts of LoRAs by Mix-of-Show's fusion: each concept's prompt is "
            "read as its own LoRA reads it. Without this node these parts are added up.",
            inputs=[
                io.Clip.Input("clip", tooltip="The base model's text encoder, without the LoRAs."),
                LoRAsToZipSocket.Input(
                    "lora_pair", tooltip="The LoRAs, from Load LoRA Pair, Load LoRA Stack or Pair LoRAs."
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="a photo of a embedding:ed_00001_\na photo of a embedding:ed_00002_",
                    tooltip="What stands for each concept: a line for each LoRA, in order. Several prompts of one LoRA "
                    "are parted by //.",
                ),
            ],
            outputs=[
                LoRAPairSocket.Output(
                    display_name="lora_pair",
                    tooltip="The same LoRAs with their text encoders' parts fused, for ZipLoRA Optimize and whatever "
                    "else takes LoRAs.",
                ),
                io.Clip.Output(
                    display_name="clip",
                    tooltip="With the fused parts on it: encode the prompts for ZipLoRA Optimize by it.",
                ),
                io.String.Output(display_name="report", tooltip="How many layers, and what is left of their error."),
            ],
        )

    @classmethod
    def execute(cls, clip, lora_pair, prompts: str) -> io.NodeOutput:
        inputs.connected(clip=clip, lora_pair=lora_pair)
        sources = sources_of(lora_pair)
        done = fuse(clip, sources, read_prompts(sources, prompts))
        return io.NodeOutput(done.sources, done.clip, "  \n".join(done.lines()))
