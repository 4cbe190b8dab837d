"""ZipLoRAScores, BlindABSheet: pictures compared by features and by people."""

from __future__ import annotations

import json

import folder_paths
from comfy_api.v0_0_2 import io, ui

from ..ziplora_core.scores import summary
from . import inputs, sheet
from .bridge import csd as style_descriptors
from .bridge.disk.paths import write_output
from .bridge.scores import score
from .bridge.training.pictures import check_pictures
from .schema import Schema


class ZipLoRAScores(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        return Schema(
            node_id="ZipLoRAScores",
            display_name="ZipLoRA Scores",
            category="ZipLoRA/compare",
            search_aliases=["clip score", "dino score", "csd score", "style similarity"],
            description="Scores pictures as the ZipLoRA paper's Table 2: style alignment (CLIP), subject alignment "
            "(DINO) and text alignment (CLIP), each a mean cosine between features; and style alignment by CSD, a "
            "network made for styles.",
            inputs=[
                io.Image.Input("images", tooltip="The pictures to score."),
                io.Image.Input("subject_references", tooltip="Pictures of the subject; all of them count the same."),
                io.Image.Input("style_references", tooltip="Pictures of the style; all of them count the same."),
                io.ClipVision.Input("clip_vision", tooltip="A CLIP vision model, from Load CLIP Vision."),
                io.ClipVision.Input("dino", tooltip="A DINOv2 model, from Load CLIP Vision too."),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoder of the same CLIP, for text alignment. Not connected: no text score.",
                ),
                io.String.Input(
                    "prompt", default="", multiline=True, tooltip="What the pictures were to show, for text alignment."
                ),
                io.Combo.Input(
                    "csd",
                    options=[inputs.NEW, *folder_paths.get_filename_list(style_descriptors.FOLDER)],
                    default=inputs.NEW,
                    optional=True,
                    tooltip="File of CSD-ViT-L in models/clip_vision, for style alignment that looks less at what a "
                    "picture shows than CLIP does.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="The scores in words: mean and spread."),
                io.String.Output(display_name="json", tooltip="The same as JSON, with each picture's scores."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, csd: str | None = inputs.NEW, **_):
        return None if csd in (None, inputs.NEW) else style_descriptors.fingerprint(csd)

    @classmethod
    def execute(
        cls,
        images,
        subject_references,
        style_references,
        clip_vision,
        dino,
        prompt: str,
        clip=None,
        csd: str = inputs.NEW,
    ) -> io.NodeOutput:
        inputs.connected(clip_vision=clip_vision, dino=dino, **{} if clip is None else {"clip": clip})
        pictures = {"images": images, "subject_references": subject_references, "style_references": style_references}
        for name, picture in pictures.items():
            check_pictures(name, [picture])
        descriptors = None if csd == inputs.NEW else style_descriptors.load(csd)
        found = score(images, subject_references, style_references, clip_vision, dino, clip, prompt, descriptors)
        summaries = summary(found)
        titles = {"csd": "style alignment by CSD"}
        lines = [f"{len(images)} pictures"]
        lines += [
            f"{titles.get(name, f'{name} alignment')}: {of['mean']:.4f} (spread {of['spread']:.4f})"
            for name, of in summaries.items()
        ]
        return io.NodeOutput("  \n".join(lines), json.dumps({**summaries, "prompt": prompt}))


class BlindABSheet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        return Schema(
            node_id="BlindABSheet",
            display_name="Blind A/B Sheet",
            category="ZipLoRA/compare",
            search_aliases=["ab test", "vote"],
            description="Two methods' pictures side by side in random order, beside the references, as in the ZipLoRA "
            "paper's user study. Which is which stands in a file of its own.",
            is_output_node=True,
            inputs=[
                io.Image.Input("images_a", tooltip="One method's pictures."),
                io.Image.Input("images_b", tooltip="The other's, as many, in the same order."),
                io.Image.Input("subject_reference", tooltip="A picture of the subject."),
                io.Image.Input("style_reference", tooltip="A picture of the style."),
                io.String.Input("name_a", default="zipped", tooltip="What the key calls the first method."),
                io.String.Input("name_b", default="direct merge", tooltip="What the key calls the second method."),
                inputs.seed("Decides which side each picture is on."),
                io.String.Input(
                    "filename_prefix",
                    default="ziplora/blind_key",
                    tooltip="Name of the key file in the output folder, which is numbered.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="sheet", tooltip="The sheet, for Save Image: a row for each pair."),
                io.String.Output(display_name="key", tooltip="The key file's name. Do not look before you have voted."),
            ],
        )

    @classmethod
    def execute(
        cls,
        images_a,
        images_b,
        subject_reference,
        style_reference,
        name_a: str,
        name_b: str,
        seed: int,
        filename_prefix: str,
    ) -> io.NodeOutput:
        pictures = {"images_a": images_a, "images_b": images_b}
        pictures |= {"subject_reference": subject_reference, "style_reference": style_reference}
        for name, picture in pictures.items():
            check_pictures(name, [picture])
        sides = sheet.sides(len(images_a), len(images_b), seed)
        image = sheet.draw(images_a, images_b, subject_reference, style_reference, sides)
        key = write_output(filename_prefix, ".json", sheet.key(sides, name_a, name_b, seed))
        return io.NodeOutput(image, key, ui=ui.PreviewImage(image, cls=cls))
