"""Host extension: teaches a stock ComfyUI to recognize and load the miniature SDXL.

It appends one model configuration. After that the stock CheckpointLoaderSimple, CLIPTextEncode, VAEEncode,
KSampler and VAEDecode work on the miniature as they do on SDXL. It defines no nodes.
"""

import comfy.supported_models

from .config import MiniatureSDXL

NODE_CLASS_MAPPINGS: dict[str, type] = {}

if not any(model.__name__ == MiniatureSDXL.__name__ for model in comfy.supported_models.models):
    comfy.supported_models.models.append(MiniatureSDXL)
