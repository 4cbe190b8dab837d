"""TwoScaleGuider: guidance by a prompt and by an adapter, each with a scale of its own."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..ziplora_core.checks import in_range
from .bridge.guider import two_scales
from .inputs import connected
from .schema import Schema

_MOST = 100.0  # as the host's own guiders


def _scale(name: str, default: float, tooltip: str):
    return io.Float.Input(name, default=default, min=0.0, max=_MOST, step=0.1, round=0.01, tooltip=tooltip)


class TwoScaleGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        return Schema(
            node_id="TwoScaleGuider",
            display_name="Two-Scale Guider",
            category="ZipLoRA",
            search_aliases=["styledrop", "style guidance", "dual cfg"],
            description="Guides sampling by the prompt and by a LoRA with a scale for each, as StyleDrop (arXiv "
            "2306.00983) does with its adapter: a stand-in for it on diffusion models. For SamplerCustomAdvanced.",
            inputs=[
                io.Model.Input("model", tooltip="The base model, without the style's LoRA."),
                io.Model.Input(
                    "adapted_model",
                    tooltip="The same model with the style's LoRA on it, from Load LoRA or Apply Zipped LoRA.",
                ),
                io.Conditioning.Input("positive", tooltip="The prompt of what to draw, in the style's words."),
                io.Conditioning.Input("negative", tooltip="The negative prompt, which the base model alone sees."),
                _scale(
                    "text_scale",
                    6.0,
                    "How strongly the base model follows the prompt: its cfg. 1 plus the paper's lambda B.",
                ),
                _scale(
                    "style_scale",
                    3.0,
                    "How strongly the LoRA pulls from the base model: 0 not at all; as much as text_scale is ordinary "
                    "cfg of the adapted model, less keeps the prompt better. 1 plus the paper's lambda A.",
                ),
                io.Conditioning.Input(
                    "adapted_positive",
                    optional=True,
                    tooltip="The same prompt as the LoRA's own text encoder makes it, where the LoRA changes that too. "
                    "Not connected: positive.",
                ),
            ],
            outputs=[io.Guider.Output(display_name="guider", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        adapted_model,
        positive,
        negative,
        text_scale: float,
        style_scale: float,
        adapted_positive=None,
    ) -> io.NodeOutput:
        connected(model=model, adapted_model=adapted_model)
        in_range("text_scale", text_scale, 0, _MOST)
        in_range("style_scale", style_scale, 0, _MOST)
        return io.NodeOutput(
            two_scales(model, adapted_model, positive, negative, adapted_positive, text_scale, style_scale)
        )
