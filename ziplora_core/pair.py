"""Two LoRAs as low-rank factors, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

CONCEPTS = ("content", "style")


@dataclass(frozen=True)
class Factors:
    """One LoRA's update of one layer, ΔW = scale · up · down, never formed.

    up: (out, rank). down: (rank, in) for a linear layer, (rank, in, *kernel) for a convolution.
    scale: strength · alpha / rank (alpha / rank is 1 where a file gives no alpha).
    A *column* of ΔW belongs to one input feature (input channel): axis 1 of `down`.

    Raises ValueError where the shapes do not multiply.
    """

    up: Tensor
    down: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.up.ndim != 2 or self.down.ndim < 2 or self.up.shape[1] != self.down.shape[0]:
            raise ValueError(
                f"up {tuple(self.up.shape)} and down {tuple(self.down.shape)} do not multiply: "
                "expected (out, rank) and (rank, in, *kernel)"
            )

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def columns(self) -> int:
        return self.down.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of ΔW: (out, in, *kernel)."""
        return (self.up.shape[0], *self.down.shape[1:])


@dataclass(frozen=True)
class LayerPair:
    """What the content and the style LoRA do to one layer; None where a LoRA leaves the layer alone.

    Raises ValueError where neither is given or the two updates differ in shape.
    """

    content: Factors | None = None
    style: Factors | None = None

    def __post_init__(self) -> None:
        if self.content is None and self.style is None:
            raise ValueError("a layer of a pair needs the content LoRA, the style LoRA, or both; found neither")
        if self.content is not None and self.style is not None and self.content.shape != self.style.shape:
            raise ValueError(f"content changes a weight of shape {self.content.shape}, style one of {self.style.shape}")

    def halves(self) -> Iterator[tuple[str, Factors]]:
        """The concepts present, content first: ("content", factors), ("style", factors)."""
        if self.content is not None:
            yield "content", self.content
        if self.style is not None:
            yield "style", self.style

    @property
    def columns(self) -> int:
        return next(self.halves())[1].columns


@dataclass(frozen=True)
class LoRAPair:
    """A content and a style LoRA fitted to one model: layer name -> LayerPair."""

    layers: Mapping[str, LayerPair]

    @property
    def coefficient_count(self) -> int:
        """Columns of both LoRAs, summed over layers: 1,571,840 for two SDXL attention LoRAs."""
        return sum(factors.columns for layer in self.layers.values() for _, factors in layer.halves())

    def layer_counts(self) -> dict[str, int]:
        """How many layers both LoRAs change, and how many only one of them."""
        kinds = {"both": 0, "content only": 0, "style only": 0}
        for layer in self.layers.values():
            if layer.style is None:
                kinds["content only"] += 1
            elif layer.content is None:
                kinds["style only"] += 1
            else:
                kinds["both"] += 1
        return kinds

    def ranks(self, concept: str) -> tuple[int, int]:
        """Smallest and largest rank of one concept ("content" or "style"); (0, 0) where it has no layer."""
        found = [f.rank for layer in self.layers.values() for name, f in layer.halves() if name == concept]
        return (min(found), max(found)) if found else (0, 0)


def column_view(coefficients: Tensor, down: Tensor) -> Tensor:
    """Coefficients (in,) shaped to multiply the columns of `down` (rank, in, *kernel)."""
    return coefficients.reshape(1, -1, *([1] * (down.ndim - 2)))
