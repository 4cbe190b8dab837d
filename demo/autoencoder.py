"""The miniature's autoencoder: narrow to train, stored in the host's TAESD layout.

The host's TAESD is 64 channels wide everywhere. Training it at full width at 128 x 128 would take most of a
day of two CPU cores, so a narrower network is trained and its weights are embedded in the 64-wide layout with
zeros around them. A residual block whose weights are all zero passes its (non-negative) input on unchanged,
so left-out blocks are exact too: the host computes the very same function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LATENT_CHANNELS = 4
# SDXL's latent format multiplies latents by this; stored as `vae_scale`, it makes the model's latents ours.
SDXL_SCALE = 0.13025


class Block(nn.Module):
    """The residual block of the TAESD layout at one width."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )
        nn.init.zeros_(self.conv[4].weight)
        nn.init.zeros_(self.conv[4].bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


def _stage(width: int, active: int, total: int) -> list[nn.Module]:
    # an all-zero block is ReLU(x): Identity after a block, a plain ReLU at the start of a stage
    out: list[nn.Module] = [Block(width) for _ in range(active)]
    while len(out) < total:
        out.append(nn.Identity() if out else nn.ReLU())
    return out


def _conv(n_in: int, n_out: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, padding=1, **options)


class Autoencoder(nn.Module):
    """128 x 128 pictures in 0..1 <-> 16 x 16 x 4 latents of about unit variance (what the UNet sees)."""

    def __init__(self) -> None:
        super().__init__()
        self.taesd_encoder = nn.Sequential(
            _conv(3, 16),
            *_stage(16, 0, 1),
            _conv(16, 32, stride=2, bias=False),
            *_stage(32, 1, 3),
            _conv(32, 48, stride=2, bias=False),
            *_stage(48, 1, 3),
            _conv(48, 64, stride=2, bias=False),
            *_stage(64, 2, 3),
            _conv(64, LATENT_CHANNELS),
        )
        self.taesd_decoder = nn.Sequential(
            Clamp(),
            _conv(LATENT_CHANNELS, 64),
            nn.ReLU(),
            *_stage(64, 3, 3),
            nn.Upsample(scale_factor=2),
            _conv(64, 48, bias=False),
            *_stage(48, 2, 3),
            nn.Upsample(scale_factor=2),
            _conv(48, 32, bias=False),
            *_stage(32, 1, 3),
            nn.Upsample(scale_factor=2),
            _conv(32, 16, bias=False),
            *_stage(16, 1, 1),
            _conv(16, 3),
        )
        self.initialize()

    def initialize(self) -> None:
        """Starting values; the last convolution of every block is zero, so that a block starts as the identity."""
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d) and layer.weight.any():
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.xavier_normal_(self.taesd_encoder[-1].weight)
        nn.init.xavier_normal_(self.taesd_decoder[-1].weight)
        nn.init.constant_(self.taesd_decoder[-1].bias, 0.5)

    def encode(self, pictures: Tensor) -> Tensor:
        """B3HW in 0..1 -> B4hw, h = H / 8."""
        return self.taesd_encoder(pictures)

    def decode(self, latents: Tensor) -> Tensor:
        """B4hw -> B3HW in 0..1 (not clamped)."""
        return self.taesd_decoder(latents)


def _edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :]


def loss(
    autoencoder: Autoencoder, pictures: Tensor, noise: float = 0.1, decoder_only: bool = False
) -> tuple[Tensor, Tensor]:
    """(loss, plain L1). L1 on pixels and on edges, latents near zero mean and unit variance per channel.

    A little noise on the latents keeps the latent space smooth enough for a diffusion model's errors.
    """
    with torch.set_grad_enabled(not decoder_only):
        latents = autoencoder.encode(pictures)
    decoded = autoencoder.decode(latents + noise * torch.randn_like(latents))
    decoded = decoded.float()
    pixel = (decoded - pictures).abs().mean()
    edge = sum((a - b).abs().mean() for a, b in zip(_edges(decoded), _edges(pictures), strict=True))
    spread = latents.float().permute(1, 0, 2, 3).flatten(1)
    unit = spread.mean(1).square().mean() + (spread.std(1) - 1).square().mean()
    return pixel + 0.5 * edge + 0.05 * unit, pixel.detach()
