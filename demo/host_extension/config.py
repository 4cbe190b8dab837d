"""The miniature as the host sees it: SDXL's classes with small numbers."""

from __future__ import annotations

import comfy.supported_models
import comfy.supported_models_base
from torch import Tensor

from .padding import widen
from .text import CONTEXT_G, CONTEXT_L, MiniatureClipModel, MiniatureTokenizer

SIZE_EMBEDDINGS = 6 * 256  # height, width, crop, target: as in SDXL


class MiniatureSDXL(comfy.supported_models.SDXL):
    """64, 128 and 128 channels at 16 x 16, 8 x 8 and 4 x 4; attention at the two smaller sizes, as in SDXL."""

    unet_config = {
        "model_channels": 64,
        "use_linear_in_transformer": True,
        "transformer_depth": [0, 1, 1],
        "context_dim": CONTEXT_L + CONTEXT_G,
        "adm_in_channels": CONTEXT_G + SIZE_EMBEDDINGS,
        "use_temporal_attention": False,
    }
    unet_extra_config = {"num_heads": -1, "num_head_channels": 32}
    picture_side = 128  # pixels: what it was trained on, asked for by Zip LoRAs

    def process_vae_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The checkpoint stores the autoencoder without its zeros: back to the 64-wide TAESD layout."""
        return widen(state_dict)

    def clip_target(self, state_dict: dict[str, Tensor] | None = None):
        return comfy.supported_models_base.ClipTarget(MiniatureTokenizer, MiniatureClipModel)
