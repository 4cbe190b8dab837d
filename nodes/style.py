"""StyleStrength, ConceptStrengths: the dial of the paper's Fig. 7a, for two concepts and for any."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..ziplora_core.checks import in_range
from .bridge.lora.loras import of_kind, role
from .bridge.lora.zipped import read_strengths, sources_of
from .inputs import connected
from .schema import Schema
from .sockets import LoRAsToApplySocket, ZippedLoRASocket


def _dial(name: str, default_tooltip: str):
    return io.Float.Input(name, default=1.0, min=0.0, max=2.0, step=0.05, tooltip=default_tooltip)


class StyleStrength(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        return Schema(
            node_id="StyleStrength",
            display_name="Style Strength",
            category="ZipLoRA",
            search_aliases=["style dial", "style weight"],
            description="Dials style and subject of a zipped pair up or down, or all styles and subjects of a set. "
            "Free: nothing is optimised again.",
            inputs=[
                LoRAsToApplySocket.Input(
                    "zipped_lora", tooltip="A zipped pair; or one that nothing has zipped, whose strengths it turns."
                ),
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
        sources = sources_of(zipped_lora)
        turned: dict[str, float] = {}
        for kind, dial in (("content", content_strength), ("style", style_strength)):
            meant = of_kind(kind, sources.by_concept)
            if dial != 1 and not meant:
                there = ", ".join(f"{role(concept)} '{source.title}'" for concept, source in sources.by_concept.items())
                raise ValueError(
                    f"{kind}_strength is {dial:g}, but none of these LoRAs is a {role(kind)} ({there}): leave it at 1, "
                    "and use Concept Strengths to turn one by its name"
                )
            turned |= dict.fromkeys(meant, dial)
        return io.NodeOutput(zipped_lora.dialled({c: dial for c, dial in turned.items() if dial != 1}))


class ConceptStrengths(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        return Schema(
            node_id="ConceptStrengths",
            display_name="Concept Strengths",
            category="ZipLoRA",
            search_aliases=["lora weights", "style of each"],
            description="Dials any LoRA of a zipped set up or down by its name. Free: nothing is optimised again.",
            inputs=[
                LoRAsToApplySocket.Input(
                    "zipped_lora",
                    tooltip="A zipped pair, or a set of any number; or one that nothing has zipped, whose strengths "
                    "it turns.",
                ),
                io.String.Input(
                    "strengths",
                    multiline=True,
                    default="content: 1.0\nstyle: 1.0",
                    tooltip="A line for each, or one line with commas: a concept as the report calls it, or its file's "
                    "name, a colon and a number. 0 none, 1 as zipped. LoRAs that are not named stay as they are.",
                ),
            ],
            outputs=[ZippedLoRASocket.Output(display_name="zipped_lora", tooltip="The set with the dials turned.")],
        )

    @classmethod
    def execute(cls, zipped_lora, strengths: str) -> io.NodeOutput:
        connected(zipped_lora=zipped_lora)
        return io.NodeOutput(zipped_lora.dialled(read_strengths(sources_of(zipped_lora), strengths)))
