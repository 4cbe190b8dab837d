"""StyleStrength: the dial of the paper's Fig. 7a."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..ziplora_core.checks import in_range
from .inputs import connected
from .sockets import ZippedLoRASocket


def _dial(name: str, default_tooltip: str):
    return io.Float.Input(name, default=1.0, min=0.0, max=2.0, step=0.05, tooltip=default_tooltip)


class StyleStrength(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StyleStrength",
            display_name="Style Strength",
            category="ZipLoRA",
            description="Dials style and subject of a zipped pair up or down. Free: nothing is optimised again.",
            inputs=[
                ZippedLoRASocket.Input("zipped_lora", tooltip="A zipped pair."),
                _dial("style_strength", "Multiplies the style's coefficients: 0 none, 1 as zipped, up to 2."),
                _dial("content_strength", "Multiplies the content's coefficients: 0 none, 1 as zipped, up to 2."),
            ],
            outputs=[ZippedLoRASocket.Output(display_name="zipped_lora", tooltip="The pair with the dials turned.")],
        )

    @classmethod
    def execute(cls, zipped_lora, style_strength: float, content_strength: float) -> io.NodeOutput:
        connected(zipped_lora=zipped_lora)
        in_range("style_strength", style_strength, -100, 100)
        in_range("content_strength", content_strength, -100, 100)
        return io.NodeOutput(zipped_lora.dialled({"content": content_strength, "style": style_strength}))
