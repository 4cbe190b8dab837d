"""A pair and a network small enough to write out by hand, in float64."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ziplora_core.branch import Branch
from ziplora_core.coefficients import Coefficients
from ziplora_core.lora_set import CONCEPTS, Factors, LoRASet
from ziplora_core.merge import merged_factors
from ziplora_core.solver import Batch, References


def of_two(content=None, style=None) -> dict:
    """Concept -> the content's and the style's, of a pair; None for what is not there."""
    return {concept: of for concept, of in zip(CONCEPTS, (content, style), strict=True) if of is not None}


def factors(shape: tuple[int, ...], rank: int, seed: int, scale: float = 1.0) -> Factors:
    """Random factors of a ΔW of `shape` (out, in, *kernel)."""
    g = torch.Generator().manual_seed(seed)
    up = torch.randn(shape[0], rank, generator=g, dtype=torch.float64) * 0.3
    down = torch.randn(rank, *shape[1:], generator=g, dtype=torch.float64) * 0.3
    return Factors(up, down, scale)


SHAPES = {"conv": (5, 3, 3, 3), "first": (7, 5), "second": (4, 7), "only content": (4, 4), "only style": (3, 4)}


def toy_pair() -> LoRASet:
    """Convolution and linear layers, unequal ranks and scales, layers that only one LoRA changes."""
    layers = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        content = None if name == "only style" else factors(shape, 2, 10 + i, 0.7)
        style = None if name == "only content" else factors(shape, 3, 20 + i, 1.3)
        layers[name] = of_two(content, style)
    return LoRASet(CONCEPTS, layers)


NAMES = ("content", "style", "other", "style 2", "other 2", "other 3", "other 4", "other 5")


def toy_set(count: int) -> LoRASet:
    """Unequal ranks and scales, and layers that some of the LoRAs leave alone; of one, that it changes all."""
    layers = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        chosen = [j for j in range(count) if count == 1 or (i + j) % 4 or i == 1]
        layers[name] = {NAMES[j]: factors(shape, 1 + j % 3, 100 * j + i, 0.5 + 0.3 * j) for j in chosen}
    return LoRASet(NAMES[:count], layers)


class Dense:
    """A frozen layer with an ordinary weight (out, in, *kernel)."""

    def __init__(self, weight: Tensor):
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(x, self.weight, padding=1) if x.ndim == 4 else x @ self.weight.T

    def backward(self, grad: Tensor, shape: torch.Size) -> Tensor:
        if grad.ndim == 4:
            return torch.nn.grad.conv2d_input(shape, self.weight, grad, padding=1)
        return grad @ self.weight


class ToyPredictor:
    """A frozen five-layer network: conv -> mean over space -> four linear layers, tanh between."""

    timesteps = 1000
    loss_scale = 1.0

    def __init__(self, joins: bool = True):
        self.joins = joins
        self.calls = 0
        g = torch.Generator().manual_seed(1)
        self.weights = {n: torch.randn(s, generator=g, dtype=torch.float64) * 0.5 for n, s in SHAPES.items()}

    def noisy(self, batch: Batch) -> Tensor:
        t = (batch.timesteps.double() / self.timesteps).reshape(-1, 1, 1, 1)
        return (1 - t) * batch.latents.double() + t * batch.noise.double()

    def __call__(self, batch: Batch, branch: Branch) -> Tensor:
        self.calls += 1

        def layer(name: str, x: Tensor) -> Tensor:
            base = Dense(self.weights[name])
            if x.ndim == 4:
                return torch.tanh(branch.layer(name, x, base, padding=1)).mean((2, 3))
            return torch.tanh(branch.layer(name, x, base))

        x = self.noisy(batch)
        for name in SHAPES:
            x = layer(name, x)
        return x


class Watched(ToyPredictor):
    """A toy network that keeps what each layer saw and was asked."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __call__(self, batch: Batch, branch: Branch) -> Tensor:
        watched = self

        class Spy:
            def layer(self, name, x, base, **options):
                watched.seen.append((name, batch.concept_index, x.clone()))
                return branch.layer(name, x, base, **options)

        return super().__call__(batch, Spy())

    def _rows(self, name: str, place: int) -> list[Tensor]:
        """What a layer saw under the reference of the concept at a place, a pass after another."""
        return [x[concept == place] for n, concept, x in self.seen if n == name]

    def features(self, name: str, place: int) -> Tensor:
        """The same, a position after another: (positions, columns)."""
        rows = self._rows(name, place)
        return torch.cat([(x.movedim(1, -1) if x.ndim == 4 else x).flatten(0, -2) for x in rows])

    def inputs(self, name: str, place: int) -> Tensor:
        """The same with all that a convolution's kernel of three by three sees: (positions, in · kernel)."""
        rows = torch.cat(self._rows(name, place))
        if rows.ndim == 4:
            rows = torch.nn.functional.unfold(rows, 3, padding=1).movedim(1, 2)
        return rows.flatten(0, -2)


def references_of(concepts: tuple[str, ...]) -> References:
    """Of unequal numbers, each concept's its own whatever its place."""
    return {
        c: torch.randn(1 + len(c) % 3, 3, 4, 4, generator=torch.Generator().manual_seed(NAMES.index(c)))
        for c in concepts
    }


def toy_references() -> References:
    g = torch.Generator().manual_seed(5)
    return of_two(torch.randn(2, 3, 4, 4, generator=g), torch.randn(3, 3, 4, 4, generator=g))


def merged_layers(loras: LoRASet, coefficients: Coefficients) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(layer name, up, down) of every layer of a merge."""
    for name, layer in loras.layers.items():
        yield name, *merged_factors(layer, coefficients.of_layer(name))
