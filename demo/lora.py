"""LoRAs on the miniature's attention, as ZipLoRA trains them, or on more linear layers; kohya names in files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .miniature import write_safetensors

TARGETS = (".to_q", ".to_k", ".to_v", ".to_out.0")
WIDE = (*TARGETS, ".ff.net.0.proj", ".ff.net.2", ".proj_in", ".proj_out")  # as kohya's scripts train by default


class LoRALinear(nn.Module):
    """A frozen linear layer and its low-rank branch: y = W x + scale * up (down x)."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base = base
        self.scale = alpha / rank
        self.down = nn.Parameter(torch.empty(rank, base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))


def attach(unet: nn.Module, rank: int, alpha: float, targets: Sequence[str] = TARGETS) -> dict[str, LoRALinear]:
    """Wraps the linear layers of the UNet's transformers whose names end so. Returns the branches by layer name."""
    branches = {}
    for name, layer in [*unet.named_modules()]:
        if not name.endswith(tuple(targets)) or not isinstance(layer, nn.Linear):
            continue
        parent_name, child = name.rsplit(".", 1)
        parent = unet.get_submodule(parent_name)
        branch = LoRALinear(layer, rank, alpha).to(layer.weight.device)
        setattr(parent, child, branch)
        branches[name] = branch
    return branches


def detach(unet: nn.Module, branches: dict[str, LoRALinear]) -> None:
    """Puts the plain layers back."""
    for name, branch in branches.items():
        parent_name, child = name.rsplit(".", 1)
        setattr(unet.get_submodule(parent_name), child, branch.base)


@torch.no_grad()
def shorten(branches: dict[str, LoRALinear], rank: int) -> None:
    """Keeps of every update its largest singular parts, so many: a smaller file."""
    for branch in branches.values():
        q, r = torch.linalg.qr(branch.up)
        left, sizes, right = torch.linalg.svd(r @ branch.down, full_matrices=False)
        roots = sizes[:rank].sqrt()
        branch.up = nn.Parameter(q @ left[:, :rank] * roots)
        branch.down = nn.Parameter(roots[:, None] * right[:rank])


def file_name(layer: str) -> str:
    """UNet layer name -> kohya's: 'lora_unet_' and underscores."""
    return "lora_unet_" + layer.replace(".", "_")


def state(branches: dict[str, LoRALinear]) -> dict[str, Tensor]:
    """Half-precision tensors under kohya's names, with alpha."""
    out: dict[str, Tensor] = {}
    for name, branch in branches.items():
        key = file_name(name)
        out[f"{key}.lora_down.weight"] = branch.down.detach().cpu().half().contiguous()
        out[f"{key}.lora_up.weight"] = branch.up.detach().cpu().half().contiguous()
        out[f"{key}.alpha"] = torch.tensor(branch.scale * branch.down.shape[0]).half()
    return out


def save(branches: dict[str, LoRALinear], path: str, metadata: dict[str, str] | None = None) -> None:
    """Writes the LoRA file atomically."""
    write_safetensors(state(branches), path, metadata)


def targets_of(tensors: Iterable[str]) -> tuple[str, ...]:
    """`WIDE` where a file's keys name more than attention projections, else `TARGETS`."""
    ends = tuple(end.replace(".", "_") for end in TARGETS)
    return TARGETS if all(key.partition(".")[0].endswith(ends) for key in tensors) else WIDE


def attach_file(unet: nn.Module, tensors: dict[str, Tensor]) -> dict[str, LoRALinear]:
    """Wraps the layers that a file has, of one rank, and loads it. Raises KeyError where it has one too many."""
    rank = next(tensor.shape[0] for key, tensor in tensors.items() if key.endswith("lora_down.weight"))
    branches = attach(unet, rank, rank, targets_of(tensors))
    try:
        load_into(branches, tensors)
    except KeyError:
        detach(unet, branches)
        raise
    return branches


@torch.no_grad()
def load_into(branches: dict[str, LoRALinear], tensors: dict[str, Tensor]) -> None:
    """Copies a file's tensors into attached branches. Raises KeyError where a layer is missing, or one too many."""
    if left := {key.partition(".")[0] for key in tensors} - {file_name(name) for name in branches}:
        raise KeyError(f"the file has a layer that is not attached: {min(left)}")
    for name, branch in branches.items():
        key = file_name(name)
        branch.down.copy_(tensors[f"{key}.lora_down.weight"])
        branch.up.copy_(tensors[f"{key}.lora_up.weight"])
        branch.scale = float(tensors[f"{key}.alpha"]) / branch.down.shape[0]
