"""ZipLoRAReference: the prompt and pictures of one more LoRA."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from .bridge.drawing.references import Reference
from .schema import Schema
from .sockets import ReferencesSocket


class ZipLoRAReference(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        return Schema(
            node_id="ZipLoRAReference",
            display_name="ZipLoRA Reference",
            category="ZipLoRA",
            description="The prompt, and pictures if there are any, of a LoRA after the second of a stack: one of "
            "these nodes for each, one after another, in the order of the stack.",
            inputs=[
                io.Conditioning.Input(
                    "positive", tooltip="The prompt that this LoRA was trained with, e.g. 'a man wearing a zrt hat'."
                ),
                io.Latent.Input(
                    "latents",
                    optional=True,
                    tooltip="Reference pictures of what this LoRA draws, VAE-encoded. Not connected: the LoRA draws "
                    "some from its prompt.",
                ),
                ReferencesSocket.Input(
                    "references",
                    optional=True,
                    tooltip="The ZipLoRA Reference of the LoRA before this one; nothing for the third LoRA.",
                ),
            ],
            outputs=[
                ReferencesSocket.Output(
                    display_name="references", tooltip="For ZipLoRA Optimize, or for the next ZipLoRA Reference."
                )
            ],
        )

    @classmethod
    def execute(cls, positive, latents=None, references=()) -> io.NodeOutput:
        return io.NodeOutput((*references, Reference(positive, latents)))
