"""Wrote kohya_oft.safetensors: run it in a checkout of kohya-ss/sd-scripts (made with 48d368fa) with the file's path.

The file holds two layers as its networks/oft.py names them, the base weights, and what its own merge makes of these.
"""

from __future__ import annotations

import sys

import torch
from networks.oft import OFTInfModule
from safetensors.torch import save_file

LAYERS = {
    "middle_block_1_transformer_blocks_0_attn1_to_q": 0.05,
    "middle_block_1_transformer_blocks_0_attn1_to_k": 1.0,
}


def main(path: str) -> None:
    """alpha: in the first layer so small that it holds the rotation back, in the second it does not."""
    torch.manual_seed(0)
    tensors = {}
    for layer, alpha in LAYERS.items():
        linear = torch.nn.Linear(64, 64, bias=False)
        module = OFTInfModule(f"oft_unet_{layer}", linear, 0.5, 4, alpha)
        torch.nn.init.normal_(module.oft_blocks, std=0.2)
        tensors[f"base.{layer}"] = linear.weight.detach().clone()
        tensors |= {f"oft_unet_{layer}.{name}": tensor for name, tensor in module.state_dict().items()}
        module.merge_to()  # at the strength that it was made with, whatever it is told here
        tensors[f"merged at 0.5.{layer}"] = linear.weight.detach().clone()
    save_file(tensors, path)


if __name__ == "__main__":
    main(sys.argv[1])
