"""UnZipLoRA: a content and a style LoRA from one picture."""

from __future__ import annotations

import math

from comfy_api.v0_0_2 import io

from ..ziplora_core.blocks import UNZIPLORA_BLOCKS, read_blocks
from ..ziplora_core.checks import Range
from ..ziplora_core.unzip import Settings, share_range
from . import inputs
from .bridge.disk import provenance
from .bridge.unzip import Task, unzip_picture
from .schema import Schema
from .sockets import LoRAPairSocket, LossMapSocket, ZippedLoRASocket

_BLOCKS = {concept: ", ".join(name.rstrip(".") for name in names) for concept, names in UNZIPLORA_BLOCKS.items()}
_SHARE = share_range(Settings.periods)
_PERCENT = Range(100 * _SHARE.low, math.floor(1000 * _SHARE.high) / 10)  # the largest, rounded down to a tenth


def _blocks(concept: str) -> io.String.Input:
    return io.String.Input(
        f"{concept}_blocks",
        default=_BLOCKS[concept],
        optional=True,
        tooltip=f"For block_separation: the blocks that are {concept}'s alone, as their layers are named; SDXL's by "
        "the paper. Another model needs its own.",
    )


class UnZipLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        return Schema(
            node_id="UnZipLoRA",
            display_name="UnZip LoRA",
            category="ZipLoRA/train",
            search_aliases=["split picture", "lora from one picture"],
            description="Takes one picture apart into a content LoRA and a style LoRA, trained together so that they "
            "stay apart (UnZipLoRA, arXiv 2412.04465). Both are ordinary files; together they are a zipped pair.",
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The base model: SDXL, or another U-Net with block_separation off."),
                io.Clip.Input("clip", tooltip="The base model's text encoder. It is not trained."),
                io.Vae.Input("vae", tooltip="The base model's VAE."),
                io.Image.Input("image", tooltip="The one picture."),
                io.String.Input(
                    "prompt", default="", tooltip="What the picture shows, and how: 'a sks dog in szn style'."
                ),
                io.String.Input("content_prompt", default="", tooltip="What it shows, in the same words: 'a sks dog'."),
                io.String.Input("style_prompt", default="", tooltip="How it shows it, in the same words: 'szn style'."),
                inputs.whole(
                    Settings,
                    "steps",
                    "Updates, the paper's 600. Columns are given out at the start of each third of them.",
                ),
                inputs.fraction(Settings, "learning_rate", 1e-5, "Adam's rate for both LoRAs, the paper's 5e-5."),
                io.Float.Input(
                    "merger_learning_rate",
                    **inputs.setting(Settings, "merger_rate"),
                    step=1e-3,
                    round=False,
                    tooltip="Adam's rate for the coefficients of the columns, the paper's 5e-3.",
                ),
                inputs.fraction(
                    Settings,
                    "similarity_lambda",
                    0.1,
                    "Weight of the overlap between the two sets of coefficients, the paper's 0.5. Only with "
                    "column_separation off: else no column has two.",
                ),
                io.Float.Input(
                    "column_share",
                    default=100 * Settings.share,
                    **inputs.span(_PERCENT),
                    step=1.0,
                    round=False,
                    tooltip="Percent of a layer's columns that a LoRA gets in each third of the run: the paper's 10.",
                ),
                inputs.whole(Settings, "rank", "Of each LoRA, the paper's 64."),
                inputs.whole(
                    Settings,
                    "batch_size",
                    "Noisy copies of the picture per step. More is steadier, slower, and takes more memory.",
                ),
                inputs.resolution(Task.resolution),
                inputs.seed("Seed of the first factors, the noise and the timesteps."),
                io.String.Input(
                    "filename_prefix",
                    default="loras/unzipped",
                    tooltip="Name of the two files in the output folder, followed by _content and _style and a number.",
                ),
                io.Boolean.Input(
                    "prompt_separation",
                    default=True,
                    optional=True,
                    tooltip="In cross-attention each LoRA sees its own prompt. Off: all see the full one.",
                ),
                io.Boolean.Input(
                    "column_separation",
                    default=True,
                    optional=True,
                    tooltip="Each LoRA changes columns of its own. Off: both change all.",
                ),
                io.Boolean.Input(
                    "block_separation",
                    default=True,
                    optional=True,
                    tooltip="Some of SDXL's blocks belong to content alone, some to style. Off: none does.",
                ),
                inputs.sample_every(
                    "Draw a rough sample of both together on the node every so many steps; 0 for never."
                ),
                inputs.save_every(
                    "Write both files every so many steps too; 0 for only at the end. An interrupt writes them as well."
                ),
                inputs.continue_from(
                    "Either of the two files that a run of this node left: goes on from both, after their steps."
                ),
                io.Boolean.Input(
                    "trained_as_used",
                    default=True,
                    optional=True,
                    tooltip="Every other noisy copy of the picture has one prompt for both LoRAs, every fifth an empty "
                    "one: so they are drawn with afterwards. Off: none, as published.",
                ),
                _blocks("content"),
                _blocks("style"),
            ],
            hidden=[io.Hidden.prompt],
            outputs=[
                LoRAPairSocket.Output(display_name="lora_pair", tooltip="Both LoRAs, to be merged in any other way."),
                ZippedLoRASocket.Output(
                    display_name="zipped_lora",
                    tooltip="Both at once, each in its own columns, for Apply Zipped LoRA and the dials.",
                ),
                LossMapSocket.Output(display_name="loss_map", tooltip="The loss of each step, for Plot Loss Graph."),
                io.String.Output(display_name="report", tooltip="The files, who got which columns, losses, memory."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        image,
        prompt: str,
        content_prompt: str,
        style_prompt: str,
        steps: int,
        learning_rate: float,
        merger_learning_rate: float,
        similarity_lambda: float,
        column_share: float,
        rank: int,
        batch_size: int,
        resolution: int,
        seed: int,
        filename_prefix: str,
        prompt_separation: bool = True,
        column_separation: bool = True,
        block_separation: bool = True,
        sample_every: int = inputs.SAMPLE_EVERY,
        save_every: int = inputs.SAVE_EVERY,
        continue_from: str = inputs.NEW,
        trained_as_used: bool = True,
        content_blocks: str = _BLOCKS["content"],
        style_blocks: str = _BLOCKS["style"],
    ) -> io.NodeOutput:
        inputs.connected(model=model, clip=clip, vae=vae)
        Settings.ranges["merger_rate"].check("merger_learning_rate", merger_learning_rate)
        _PERCENT.check("column_share", column_share)
        settings = Settings(
            steps=steps,
            learning_rate=learning_rate,
            rank=rank,
            batch_size=batch_size,
            seed=seed,
            merger_rate=merger_learning_rate,
            similarity_lambda=similarity_lambda,
            share=column_share / 100,
        )
        done = unzip_picture(
            model,
            clip,
            vae,
            Task(
                image,
                {"full": prompt, "content": content_prompt, "style": style_prompt},
                settings,
                filename_prefix,
                resolution,
                prompt_separation,
                column_separation,
                block_separation,
                trained_as_used,
                sample_every,
                save_every,
                inputs.file_to_continue(continue_from),
                read_blocks(content_blocks, style_blocks),
                metadata=provenance.workflow(cls.hidden),
            ),
        )
        files = tuple(provenance.written(name) for name in done.files)
        return io.NodeOutput(done.pair, done.zipped, done.loss_map, done.report, ui={"files": files})
