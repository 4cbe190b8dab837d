"""ComfyUI-ZipLoRA: any subject in any style, from two LoRAs that were never trained together."""

from comfy_api.v0_0_2 import ComfyExtension

from .nodes import NODES

WEB_DIRECTORY = "./web"


class ZipLoRAExtension(ComfyExtension):
    async def get_node_list(self) -> list:
        return NODES


async def comfy_entrypoint() -> ZipLoRAExtension:
    return ZipLoRAExtension()
