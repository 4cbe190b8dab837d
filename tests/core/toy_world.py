"""An atlas of ellipses, for tests that shall need no emoji set."""

from __future__ import annotations

import torch

from demo.world import atlas, sets, subjects


def toy_atlas() -> atlas.Atlas:
    """Ellipses of every subject in every set, each of a color of its own."""
    keys = [(subject, word) for subject in subjects.ICONS for word in sets.SETS]
    side = torch.linspace(-1, 1, 32)
    x, y = torch.meshgrid(side, side, indexing="xy")
    inside = ((x / 0.9) ** 2 + (y / 0.6) ** 2 < 1).float()
    shape = torch.nn.functional.interpolate(inside[None, None], size=(atlas.SIZE, atlas.SIZE))[0, 0]
    colors = torch.rand(len(keys), 3, generator=torch.Generator().manual_seed(0))
    pictures = torch.empty(len(keys), 4, 1, 1, dtype=torch.uint8).expand(-1, -1, atlas.SIZE, atlas.SIZE)
    return Shared(keys, pictures, "toy", shape, colors)


class Shared(atlas.Atlas):
    """An atlas that makes its pictures when asked: thousands of them would fill the memory."""

    def __init__(self, keys, pictures, digest, shape, colors):  # type: ignore[no-untyped-def]
        super().__init__(keys, pictures, digest)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "colors", colors)

    def find(self, keys, device="cpu"):  # type: ignore[no-untyped-def]
        chosen = [self.number[key] for key in keys]
        color = self.colors[chosen].view(-1, 3, 1, 1).expand(-1, -1, atlas.SIZE, atlas.SIZE)
        alpha = self.shape.expand(len(chosen), 1, -1, -1)
        return torch.cat([color * alpha, alpha], dim=1).to(device)
