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
ENCODER = (24, 40, 64, 64)  # channels at 128, 64, 32 and 16 pixels
ENCODER_BLOCKS = (0, 1, 1, 2)
DECODER = (64, 64, 40, 24)  # channels at 16, 32, 64 and 128 pixels
DECODER_BLOCKS = (3, 2, 1, 1)


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
    """128 x 128 pictures in 0..1 <-> 16 x 16 x 4 latents of about unit variance."""

    def __init__(self, decoder_blocks: tuple[int, ...] = DECODER_BLOCKS) -> None:
        super().__init__()
        a, b, c, d = ENCODER
        self.taesd_encoder = nn.Sequential(
            _conv(3, a),
            *_stage(a, ENCODER_BLOCKS[0], 1),
            _conv(a, b, stride=2, bias=False),
            *_stage(b, ENCODER_BLOCKS[1], 3),
            _conv(b, c, stride=2, bias=False),
            *_stage(c, ENCODER_BLOCKS[2], 3),
            _conv(c, d, stride=2, bias=False),
            *_stage(d, ENCODER_BLOCKS[3], 3),
            _conv(d, LATENT_CHANNELS),
        )
        a, b, c, d = DECODER
        self.taesd_decoder = nn.Sequential(
            Clamp(),
            _conv(LATENT_CHANNELS, a),
            nn.ReLU(),
            *_stage(a, decoder_blocks[0], 3),
            nn.Upsample(scale_factor=2),
            _conv(a, b, bias=False),
            *_stage(b, decoder_blocks[1], 3),
            nn.Upsample(scale_factor=2),
            _conv(b, c, bias=False),
            *_stage(c, decoder_blocks[2], 3),
            nn.Upsample(scale_factor=2),
            _conv(c, d, bias=False),
            *_stage(d, decoder_blocks[3], 1),
            _conv(d, 3),
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


def blocks_of(state: dict[str, Tensor]) -> tuple[int, ...]:
    """How many blocks each stage of a stored decoder has."""
    places = ((3, 4, 5), (8, 9, 10), (13, 14, 15), (18,))
    return tuple(sum(f"taesd_decoder.{i}.conv.0.weight" in state for i in stage) for stage in places)


def load(state: dict[str, Tensor], decoder_blocks: tuple[int, ...] | None = None) -> Autoencoder:
    """An autoencoder with these weights. Blocks beyond the stored ones are the identity."""
    model = Autoencoder(decoder_blocks or blocks_of(state))
    fresh = model.state_dict()
    for key, value in fresh.items():
        if key not in state and ".conv." not in key:
            raise KeyError(f"the autoencoder's file lacks {key} of shape {tuple(value.shape)}")
    model.load_state_dict({key: state.get(key, value) for key, value in fresh.items()})
    return model


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :]


def sharpness(decoded: Tensor, pictures: Tensor) -> dict[str, float]:
    """PSNR in dB and the edge figure: what share of the true edges' strength the decoded picture shows in its place.

    The edge figure is the sum of min(|d|, |t|) where d and t have one sign, over the sum of |t|, for the differences
    d and t of neighboring pixels: 1 for the truth itself, lower for blurred edges.
    """
    error = (decoded.clamp(0, 1) - pictures).square().flatten(1).mean(1).clamp(min=1e-10)
    shown, there = 0.0, 0.0
    for mine, true in zip(edges(decoded.clamp(0, 1)), edges(pictures), strict=True):
        shown += float((torch.minimum(mine.abs(), true.abs()) * (mine * true > 0)).sum())
        there += float(true.abs().sum())
    return {"psnr": float((-10 * error.log10()).mean()), "edges": shown / max(there, 1e-6)}


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
    edge = sum((a - b).abs().mean() for a, b in zip(edges(decoded), edges(pictures), strict=True))
    spread = latents.float().permute(1, 0, 2, 3).flatten(1)
    unit = spread.mean(1).square().mean() + (spread.std(1) - 1).square().mean()
    return pixel + 0.5 * edge + 0.05 * unit, pixel.detach()
