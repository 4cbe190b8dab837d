"""CompareMerges: each LoRA alone, all of them stacked and the zip at several dials, side by side."""

from __future__ import annotations

from comfy_api.v0_0_2 import io, ui

from ..ziplora_core.checks import Range
from . import inputs, sheet
from .bridge import compare as comparing
from .bridge.drawing import recipes, sampling
from .schema import Schema
from .sockets import LoRAsToApplySocket

_LAZY = ("model", "clip", "vae", "zipped_lora")
_SIDE = Range(0, sampling.DRAWN.high)


def _side(name: str) -> io.Int.Input:
    return inputs.advanced(
        io.Int.Input(
            name,
            default=0,
            **inputs.span(_SIDE),
            step=8,
            optional=True,
            tooltip="Of each picture, in pixels. 0: what the model draws best, 1024 for SDXL, 512 for SD 1.5.",
        )
    )


class CompareMerges(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        return Schema(
            node_id="CompareMerges",
            display_name="Compare Merges",
            category="ZipLoRA/compare",
            search_aliases=["compare", "side by side", "grid", "xy plot"],
            description="One labelled strip of pictures, all with one seed: each LoRA alone, all of them stacked as by "
            "LoRA loaders in a row, and the zip at several strengths of its style.",
            is_output_node=True,
            inputs=[
                io.Model.Input("model", lazy=True, tooltip="The checkpoint's model, without these LoRAs."),
                io.Clip.Input("clip", lazy=True, tooltip="The checkpoint's text encoder, without these LoRAs."),
                io.Vae.Input("vae", lazy=True, tooltip="The checkpoint's VAE."),
                LoRAsToApplySocket.Input("zipped_lora", lazy=True, tooltip="The zipped LoRAs, two or any number."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    placeholder="a prompt on each line: a row of pictures for each",
                    tooltip="What to draw, in the words of all LoRAs, e.g. 'a sks dog in szn style'. Each line is a "
                    "row of pictures.",
                ),
                io.String.Input("negative", multiline=True, default="", tooltip="What not to draw, in all pictures."),
                io.String.Input(
                    "dials",
                    default="0.5, 1, 1.5",
                    tooltip="Strengths of the style in the zip, with commas between them: a column for each. 0 none, 1 "
                    "as zipped. Of several styles all are turned; of LoRAs without a style, the zip as a whole.",
                ),
                inputs.seed("Of the noise of every picture: they differ by the LoRAs alone."),
                io.Int.Input(
                    "steps", default=20, **inputs.span(sampling.DRAWING_STEPS), tooltip="Steps of each picture."
                ),
                io.Float.Input(
                    "cfg",
                    default=5.0,
                    **inputs.span(sampling.CFG),
                    step=0.1,
                    round=0.01,
                    tooltip="How closely pictures follow their prompt, as in KSampler.",
                ),
                inputs.advanced(inputs.choice("sampler_name", sampling.SAMPLERS, "As in KSampler.", recipes.SAMPLER)),
                inputs.advanced(inputs.choice("scheduler", sampling.SCHEDULERS, "As in KSampler.", recipes.SCHEDULER)),
                _side("width"),
                _side("height"),
            ],
            outputs=[
                io.Image.Output(display_name="strip", tooltip="All pictures in one, with labels, for Save Image."),
                io.Image.Output(
                    display_name="pictures", tooltip="Each picture at its full size, row by row, in the strip's order."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, prompts: str | None, negative: str | None, dials: str | None) -> bool | str:
        try:
            comparing.check_words(prompts, negative, dials)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def check_lazy_status(cls, prompts: str, negative: str, dials: str, **given) -> list[str]:
        """Which inputs to make next: what can be refused is refused before anything is loaded or zipped."""
        comparing.check_words(prompts, negative, dials)
        return inputs.not_made(_LAZY, given)

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        zipped_lora,
        prompts: str,
        negative: str,
        dials: str,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str = recipes.SAMPLER,
        scheduler: str = recipes.SCHEDULER,
        width: int = 0,
        height: int = 0,
    ) -> io.NodeOutput:
        inputs.connected(model=model, clip=clip, vae=vae, zipped_lora=zipped_lora)
        how = {"seed": seed, "steps": steps, "cfg": cfg, "sampler_name": sampler_name, "scheduler": scheduler}
        how |= {"width": width, "height": height}
        made = comparing.compare(model, clip, vae, zipped_lora, prompts, negative, dials, **how)
        image = sheet.strip(made.headings, made.prompts, made.pictures)
        return io.NodeOutput(image, made.pictures, ui=ui.PreviewImage(image, cls=cls))
