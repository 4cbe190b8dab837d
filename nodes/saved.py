"""SaveZippedLoRA, LoadZippedLoRA: zipped pairs on disk."""

from __future__ import annotations

import folder_paths
from comfy_api.v0_0_2 import io

from .bridge import saved
from .bridge.disk import provenance
from .inputs import connected
from .schema import Schema
from .sockets import ZippedLoRASocket


class SaveZippedLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        return Schema(
            node_id="SaveZippedLoRA",
            display_name="Save Zipped LoRA",
            category="ZipLoRA/files",
            search_aliases=["keep zip"],
            description="Saves what was learned of the LoRAs, not the LoRAs: a few megabytes for two; for three and "
            "more that are routed a matrix for each layer (83 MB for three of rank 64 on SDXL, more with rank and "
            "number); for solver fusion about half of the LoRAs (402 MB for two). Bound to the LoRA files by hash; "
            "Load Zipped LoRA makes the set again. For other programs use Export Merged LoRA.",
            is_output_node=True,
            inputs=[
                ZippedLoRASocket.Input("zipped_lora", tooltip="A zipped pair, with its dials as they are."),
                io.String.Input(
                    "filename_prefix",
                    default="zipped",
                    tooltip="Name of the file in output/ziplora, which is numbered. May have folders in front.",
                ),
            ],
            hidden=[io.Hidden.prompt],
            outputs=[io.String.Output(display_name="file", tooltip="The file's name, as Load Zipped LoRA lists it.")],
        )

    @classmethod
    def execute(cls, zipped_lora, filename_prefix: str) -> io.NodeOutput:
        connected(zipped_lora=zipped_lora)
        name = saved.save(zipped_lora, filename_prefix, provenance.workflow(cls.hidden))
        file = provenance.written(f"{saved.FOLDER}/{name}")
        return io.NodeOutput(name, ui={"text": (name,), "files": (file,)})


class LoadZippedLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        return Schema(
            node_id="LoadZippedLoRA",
            display_name="Load Zipped LoRA",
            category="ZipLoRA/files",
            search_aliases=["open zip"],
            description="Makes a zipped set again from what was saved of it and its LoRA files, which are found by "
            "their contents, whatever they are called now.",
            inputs=[
                io.Model.Input("model", tooltip="The base model that it was zipped on, or one of the same family."),
                io.Combo.Input(
                    "zipped",
                    options=folder_paths.get_filename_list(saved.FOLDER),
                    tooltip="A file that Save Zipped LoRA wrote, from output/ziplora or models/ziplora.",
                ),
            ],
            outputs=[
                ZippedLoRASocket.Output(
                    display_name="zipped_lora", tooltip="The zipped pair, with its dials as saved."
                ),
                io.String.Output(display_name="report", tooltip="The report of its zipping."),
            ],
        )

    @classmethod
    def validate_inputs(cls, zipped: str | None) -> bool | str:
        return (zipped is not None and saved.check(zipped)) or True

    @classmethod
    def fingerprint_inputs(cls, zipped: str | None, **_):
        return None if zipped is None else saved.fingerprint(zipped)

    @classmethod
    def execute(cls, model, zipped: str) -> io.NodeOutput:
        connected(model=model)
        loaded = saved.load(model, zipped)
        return io.NodeOutput(loaded, loaded.report)
