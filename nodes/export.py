"""ExportMergedLoRA: a zipped pair as one LoRA file."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..ziplora_core.checks import one_of
from ..ziplora_core.export import DTYPES
from .bridge import export
from .bridge.disk import provenance
from .inputs import connected
from .schema import Schema
from .sockets import LoRAModelSocket, ZippedLoRASocket


class ExportMergedLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        return Schema(
            node_id="ExportMergedLoRA",
            display_name="Export Merged LoRA",
            category="ZipLoRA/files",
            search_aliases=["kohya", "diffusers lora", "save lora file"],
            description="Writes a zipped pair, with its dials as they are, as one ordinary LoRA file, for ComfyUI "
            "and most other programs (kohya) or for diffusers.",
            is_output_node=True,
            inputs=[
                ZippedLoRASocket.Input("zipped_lora", tooltip="A zipped pair, with its dials as they are."),
                io.String.Input(
                    "filename_prefix",
                    default="loras/zipped",
                    tooltip="Name of the file in the output folder, which is numbered. LoRA loaders list output/loras.",
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip="0: exact, at the sum of both ranks. A smaller rank makes a smaller file; the report says "
                    "how much is kept.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="fp16",
                    tooltip="Numbers in the file. fp16 is what most LoRA files hold; fp32 is exact and twice as large.",
                ),
                io.Combo.Input(
                    "format",
                    options=list(export.FORMATS),
                    default="kohya",
                    tooltip="kohya: for ComfyUI, Forge, A1111 and most others. diffusers: peft's names, for diffusers; "
                    "ComfyUI's own loaders do not read them.",
                ),
            ],
            hidden=[io.Hidden.prompt],
            outputs=[
                LoRAModelSocket.Output(display_name="lora", tooltip="The same LoRA, for Load LoRA Model."),
                io.String.Output(
                    display_name="report", tooltip="The file, its ranks and size, what was cut and what was left out."
                ),
            ],
        )

    @classmethod
    def execute(cls, zipped_lora, filename_prefix: str, rank: int, dtype: str, format: str) -> io.NodeOutput:
        connected(zipped_lora=zipped_lora)
        one_of("dtype", dtype, DTYPES)
        one_of("format", format, export.FORMATS)
        metadata = {**provenance.workflow(cls.hidden), **provenance.pair(zipped_lora.sources)}
        tensors, report, name = export.export_file(zipped_lora, filename_prefix, rank, dtype, format, metadata)
        return io.NodeOutput(tensors, report, ui={"text": (report,), "files": (provenance.written(name),)})
