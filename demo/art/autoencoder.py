"""The second world's autoencoder: the TAESD layout, wider and deeper than the first one's.

The decoder may grow after the encoder is done: a new block starts as the identity, so latents stay what they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..autoencoder import LATENT_CHANNELS, Autoencoder, Clamp, _conv, _edges, _stage

ENCODER = (24, 40, 64, 64)  # channels at 128, 64, 32 and 16 pixels
ENCODER_BLOCKS = (0, 1, 1, 2)
DECODER = (64, 64, 40, 24)  # channels at 16, 32, 64 and 128 pixels
DECODER_BLOCKS = (3, 2, 1, 1)


class ArtAutoencoder(Autoencoder):
    """128 x 128 pictures in 0..1 <-> 16 x 16 x 4 latents of about unit variance."""

    def __init__(self, decoder_blocks: tuple[int, ...] = DECODER_BLOCKS) -> None:
        nn.Module.__init__(self)
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


def blocks_of(state: dict[str, Tensor]) -> tuple[int, ...]:
    """How many blocks each stage of a stored decoder has."""
    places = ((3, 4, 5), (8, 9, 10), (13, 14, 15), (18,))
    return tuple(sum(f"taesd_decoder.{i}.conv.0.weight" in state for i in stage) for stage in places)


def load(state: dict[str, Tensor], decoder_blocks: tuple[int, ...] | None = None) -> ArtAutoencoder:
    """An autoencoder with these weights. Blocks beyond the stored ones are the identity."""
    model = ArtAutoencoder(decoder_blocks or blocks_of(state))
    fresh = model.state_dict()
    for key, value in fresh.items():
        if key not in state and ".conv." not in key:
            raise KeyError(f"the autoencoder's file lacks {key} of shape {tuple(value.shape)}")
    model.load_state_dict({key: state.get(key, value) for key, value in fresh.items()})
    return model


def sharpness(decoded: Tensor, pictures: Tensor) -> dict[str, float]:
    """PSNR in dB and the edge figure: what share of the true edges' strength the decoded picture shows in its place.

    The edge figure is the sum of min(|d|, |t|) where d and t have one sign, over the sum of |t|, for the differences
    d and t of neighboring pixels: 1 for the truth itself, lower for blurred edges.
    """
    error = (decoded.clamp(0, 1) - pictures).square().flatten(1).mean(1).clamp(min=1e-10)
    shown, there = 0.0, 0.0
    for mine, true in zip(_edges(decoded.clamp(0, 1)), _edges(pictures), strict=True):
        shown += float((torch.minimum(mine.abs(), true.abs()) * (mine * true > 0)).sum())
        there += float(true.abs().sum())
    return {"psnr": float((-10 * error.log10()).mean()), "edges": shown / max(there, 1e-6)}
