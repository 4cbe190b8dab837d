"""KLoRA: in each layer and step one of two LoRAs."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..ziplora_core import k_lora
from ..ziplora_core.checks import Range
from .bridge.k_lora import put_on
from .bridge.lora.zipped import sources_of
from .inputs import advanced, connected, span
from .schema import Schema
from .sockets import LoRAsToZipSocket

_SHARE = Range(0.0, 10.0)


def _setting(name: str, default: float, tooltip: str) -> io.Float.Input:
    return advanced(
        io.Float.Input(name, default=default, **span(_SHARE), step=0.05, round=False, optional=True, tooltip=tooltip)
    )


class KLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        return Schema(
            node_id="KLoRA",
            display_name="K-LoRA",
            category="ZipLoRA",
            search_aliases=["klora", "merge without training", "switch loras"],
            description="Puts two LoRAs on a model so that in each layer and step one of them acts alone: first mostly "
            "the subject's, then mostly the style's. To compare with a zipped pair. It is no merge: it cannot be saved "
            "or exported.",
            inputs=[
                io.Model.Input("model", tooltip="The base model, without the two LoRAs. Other LoRAs may be on it."),
                LoRAsToZipSocket.Input(
                    "lora_pair",
                    tooltip="One content (subject) and one style LoRA, from Load LoRA Pair. Their strengths count in "
                    "what they draw, not in which one is chosen. Of a zipped pair, the two LoRAs as they are.",
                ),
                _setting(
                    "alpha",
                    k_lora.ALPHA,
                    "How much the style gains from the first step to the last. 1.5 is the paper's; 0: the same LoRA in "
                    "a layer all the time.",
                ),
                _setting(
                    "beta",
                    k_lora.BETA,
                    "What the style counts in the first step, where 1 makes both LoRAs equal. 0.5 is the paper's; more "
                    "gives the style more layers.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The checkpoint's text encoder. Where a LoRA file has a text-encoder part, both are added "
                    "here as a LoRA loader does; not connected, they are left out, and the node says so.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with both LoRAs, for a sampler."),
                io.Clip.Output(
                    display_name="clip",
                    tooltip="The text encoder with both files' parts, if connected: encode what to draw with it.",
                ),
                io.String.Output(display_name="report", tooltip="In how many layers which LoRA acts, and when."),
            ],
        )

    @classmethod
    def execute(
        cls, model, lora_pair, alpha: float = k_lora.ALPHA, beta: float = k_lora.BETA, clip=None
    ) -> io.NodeOutput:
        connected(model=model, lora_pair=lora_pair, **{} if clip is None else {"clip": clip})
        for name, value in {"alpha": alpha, "beta": beta}.items():
            _SHARE.check(name, value)
        return io.NodeOutput(*put_on(model, clip, sources_of(lora_pair), alpha, beta))
