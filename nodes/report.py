"""ZippedLoRAReport: pictures of what a merge did."""

from __future__ import annotations

from comfy_api.v0_0_2 import io, ui

from .figures import Subject, draw
from .inputs import connected
from .schema import Schema
from .sockets import LossMapSocket, ZippedLoRASocket

_ONE, _APART = "one picture", "a picture for each panel"


class ZippedLoRAReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        return Schema(
            node_id="ZippedLoRAReport",
            display_name="Zipped LoRA Report",
            category="ZipLoRA/compare",
            search_aliases=["plot merge"],
            description="Draws what a merge did: how far the LoRAs' columns interfere in each layer before and "
            "after, how their elements are distributed, the losses, where the coefficients ended and who owns the "
            "columns.",
            is_output_node=True,
            inputs=[
                ZippedLoRASocket.Input("zipped_lora", tooltip="A zipped pair or a direct merge."),
                LossMapSocket.Input(
                    "loss_map", optional=True, tooltip="From ZipLoRA Optimize: adds the losses of its steps."
                ),
                io.Combo.Input(
                    "layout",
                    options=[_ONE, _APART],
                    default=_ONE,
                    tooltip="All panels in one picture, or a batch with one picture for each.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The picture, for Save Image or Preview Image.")],
        )

    @classmethod
    def execute(cls, zipped_lora, layout: str, loss_map=None) -> io.NodeOutput:
        connected(zipped_lora=zipped_lora)
        subject = Subject(zipped_lora.fitted.loras, zipped_lora.coefficients, loss_map, bool(zipped_lora.routing))
        image = draw(subject, layout == _APART)
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))
