"""LoRAs fitted to one model, as low-rank factors, layer by layer: any number of them, each known by its concept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

CONCEPTS = ("content", "style")  # of a pair: the paper's two


def is_pair(concepts: Iterable[str]) -> bool:
    """Whether they are the paper's two, in any order."""
    return set(concepts) == set(CONCEPTS)


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


Layer = Mapping[str, Factors]  # concept -> its update, of the LoRAs that change a layer, all of one shape


def columns(layer: Layer) -> int:
    return next(iter(layer.values())).columns


def on_one_up(layer: Layer) -> bool:
    """Whether several updates stand on one and the same `up` (the tensor, not its like): their downs add up."""
    ups = {id(factors.up) for factors in layer.values()}
    return len(layer) > 1 and len(ups) == 1


def joined_rank(layer: Layer) -> int:
    """Rank of the merge of a layer as one LoRA: the sum of the ranks, or that of the `up` that all stand on."""
    return next(iter(layer.values())).rank if on_one_up(layer) else sum(factors.rank for factors in layer.values())


@dataclass(frozen=True)
class LoRASet:
    """LoRAs fitted to one model: layer name -> Layer.

    concepts: their names, in the order of everything that is built from a set: the rank axis, the rows of a
    batch, the vector of all coefficients. A LoRA that leaves a layer alone is not in that Layer.

    Raises ValueError for two concepts of one name, and, naming the layer, where no LoRA or an unknown one changes it
    and where two updates differ in shape.
    """

    concepts: tuple[str, ...]
    layers: Mapping[str, Layer]

    def __post_init__(self) -> None:
        if len(set(self.concepts)) < len(self.concepts):
            raise ValueError(f"concepts need names of their own; found {', '.join(self.concepts)}")
        layers = {name: self._checked(name, layer) for name, layer in self.layers.items()}
        object.__setattr__(self, "layers", layers)

    def _checked(self, name: str, layer: Layer) -> Layer:
        """The layer in the order of the concepts. Raises ValueError as the class does."""
        ordered = {concept: layer[concept] for concept in self.concepts if concept in layer}
        if not ordered or len(ordered) < len(layer):
            known, given = ", ".join(self.concepts), ", ".join(layer) or "neither"
            raise ValueError(f"layer '{name}' needs a LoRA of the set that changes it ({known}); found {given}")
        first = next(iter(ordered))
        for concept, factors in ordered.items():
            if factors.shape != ordered[first].shape:
                raise ValueError(
                    f"layer '{name}': {first} changes a weight of shape {ordered[first].shape}, {concept} one of "
                    f"{factors.shape}"
                )
        return layer if list(layer) == list(ordered) else ordered

    @property
    def coefficient_count(self) -> int:
        """Columns of all LoRAs, summed over layers: 1,571,840 for two SDXL attention LoRAs."""
        return sum(factors.columns for layer in self.layers.values() for factors in layer.values())

    def layer_counts(self) -> dict[str, int]:
        """How many layers all LoRAs change ("both", where they are two), some of them, and only one of them."""
        count = len(self.concepts)
        whole = "both" if count == 2 else "all"
        kinds = {whole: 0} if count > 1 else {}
        kinds |= {"some": 0} if count > 2 else {}
        kinds |= {f"{concept} only": 0 for concept in self.concepts}
        for layer in self.layers.values():
            alone = len(layer) == 1
            kinds[f"{next(iter(layer))} only" if alone else whole if len(layer) == count else "some"] += 1
        return kinds

    def ranks(self, concept: str) -> tuple[int, int]:
        """Smallest and largest rank of one concept's LoRA; (0, 0) where it has no layer."""
        ranks = [layer[concept].rank for layer in self.layers.values() if concept in layer]
        return (min(ranks), max(ranks)) if ranks else (0, 0)

    def common_layers(self) -> Iterator[tuple[str, str, list[str]]]:
        """Each two concepts, in order, and the layers that both change; not those that have none in common."""
        for one, other in combinations(self.concepts, 2):
            both = [name for name, layer in self.layers.items() if one in layer and other in layer]
            if both:
                yield one, other, both


def wide(factor: Tensor) -> Tensor:
    """A factor in a dtype to calculate in: float64, or float32. float8 has no arithmetic of its own."""
    return factor if factor.dtype == torch.float64 else factor.float()


def column_view(coefficients: Tensor, down: Tensor) -> Tensor:
    """Coefficients (in,) shaped to multiply the columns of `down` (rank, in, *kernel)."""
    return coefficients.reshape(1, -1, *([1] * (down.ndim - 2)))


def column_grams(factors: Sequence[Factors], dtype: torch.dtype = torch.float32) -> Tensor:
    """Inner products of the columns that n LoRAs have in one layer: (columns, n, n) float64, no ΔW formed.

    Σ over rows (and kernel) of ΔW_i ⊙ ΔW_j is diag(A_iᵀ (B_iᵀ B_j) A_j); a convolution's column is all that belongs to
    one input channel. dtype: of the products.
    """
    downs = [f.down.to(dtype).flatten(2) if f.down.ndim > 2 else f.down.to(dtype)[..., None] for f in factors]
    ups = [f.scale * f.up.to(dtype) for f in factors]
    grams = torch.empty(factors[0].columns, len(factors), len(factors), dtype=torch.float64, device=ups[0].device)
    for i, (up, down) in enumerate(zip(ups, downs, strict=True)):
        for j in range(i + 1):
            projected = ((ups[j].T @ up) @ down.flatten(1)).view(-1, *down.shape[1:])
            grams[:, i, j] = grams[:, j, i] = projected.mul_(downs[j]).sum((0, 2))
    return grams
