"""The low-rank branch of a forward pass: what the LoRAs of a set add to each layer's output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .coefficients import Coefficients
from .frozen import Base, JoinedLayer, Update, frozen_with
from .lora_set import Layer, LoRASet
from .merge import merged_factors


def join(layer: Layer, device: torch.device | str, dtype: torch.dtype) -> JoinedLayer:
    up, down = merged_factors(layer)
    return JoinedLayer(up.to(device, dtype), down.to(device, dtype), {c: f.rank for c, f in layer.items()})


def _positions(starts: Sequence[int], sizes: Sequence[int], device: torch.device) -> Tensor:
    """Indices of several runs of a vector, one after another."""
    runs = [torch.arange(start, start + size, device=device) for start, size in zip(starts, sizes, strict=True)]
    return torch.cat(runs) if runs else torch.zeros(0, dtype=torch.int64, device=device)


class JoinedSet:
    """A set of LoRAs prepared for many forward passes: joined factors in the compute dtype, on the compute device.

    The coefficients of all layers form one flat float32 vector, so that one optimizer update serves them all:
    layer by layer in the set's order, in each layer the concepts in theirs.
    """

    def __init__(self, loras: LoRASet, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        self.loras = loras
        self.device = torch.device(device)
        self.dtype = dtype
        self.layers = {name: join(layer, device, dtype) for name, layer in loras.layers.items()}
        self._slots = [(name, concept) for name, layer in loras.layers.items() for concept in layer]
        self._layer_sizes = [self.layers[name].columns * len(layer) for name, layer in loras.layers.items()]
        self._sizes = [self.layers[name].columns for name, _ in self._slots]
        starts = dict(zip(self._slots, accumulate(self._sizes, initial=0), strict=False))
        known: dict[tuple[str, ...], Tensor] = {}  # LoRAs that change the same layers share them with all others

        def positions(concept: str, names: list[str], sizes: list[int]) -> Tensor:
            key = (concept, *names)
            if key not in known:
                known[key] = _positions([starts[name, concept] for name in names], sizes, self.device)
            return known[key]

        self._shared = []
        for one, other, names in loras.common_layers():
            sizes = [self.layers[name].columns for name in names]
            self._shared.append((positions(one, names, sizes), positions(other, names, sizes), sizes))

    @property
    def concepts(self) -> tuple[str, ...]:
        return self.loras.concepts

    def ones(self) -> Coefficients:
        """The direct merge."""
        return Coefficients.ones(self.loras)

    def flatten(self, coefficients: Coefficients) -> Tensor:
        """All coefficients as one vector (coefficient_count,) on this set's device, float32 or wider."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        return torch.cat([coefficients[concept][name].to(self.device, dtype) for name, concept in self._slots])

    def unflatten(self, flat: Tensor) -> Coefficients:
        """The inverse of `flatten`: float32 copies on the CPU."""
        parts = self.split(flat.detach())
        return Coefficients(
            {c: {n: m.to("cpu", torch.float32, copy=True) for n, m in by.items()} for c, by in parts.items()}
        )

    def split(self, flat: Tensor) -> dict[str, dict[str, Tensor]]:
        """Views of `flat`: concept -> layer -> (columns,)."""
        parts: dict[str, dict[str, Tensor]] = {concept: {} for concept in self.concepts}
        for (name, concept), part in zip(self._slots, torch.split(flat, self._sizes), strict=True):
            parts[concept][name] = part
        return parts

    def shared_columns(self, flat: Tensor) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
        """(m_i, m_j, columns of each layer) of the columns that two LoRAs change, layer after layer, for each two that
        share some: the terms of the overlap."""
        for one, other, sizes in self._shared:
            yield flat[one], flat[other], sizes

    def student(self, flat: Tensor) -> Branch:
        """Every row sees ΔW_m = Σ_i ΔW_i·diag(m_i); differentiable in `flat`."""
        parts = torch.split(flat, self._layer_sizes)
        return Branch(self.layers, coefficients=dict(zip(self.layers, parts, strict=True)))

    def teacher(self, concept_index: Tensor) -> Branch:
        """Row i sees its own LoRA alone. concept_index: (rows,) int64, ascending, as of a `Batch`."""
        return Branch(self.layers, rows=self.rows(concept_index))

    def rows(self, concept_index: Tensor) -> dict[str, int]:
        """Concept -> how many rows are its own, of those that `teacher` takes."""
        counts = torch.bincount(concept_index, minlength=len(self.concepts)).tolist()
        return dict(zip(self.concepts, counts, strict=True))


class Branch:
    """What the LoRAs do in one forward pass, as student (with coefficients) or as teacher (with rows).

    A predictor hands `layer` the input of each layer that the set changes. rows: concept -> how many rows see its LoRA,
    in the order in which they come.
    """

    def __init__(
        self,
        layers: Mapping[str, JoinedLayer],
        coefficients: Mapping[str, Tensor] | None = None,
        rows: Mapping[str, int] | None = None,
    ):
        if (coefficients is None) == (rows is None):
            raise ValueError("a branch is a student, with coefficients, or a teacher, with rows; found both or none")
        self._layers = layers
        self._coefficients = coefficients
        self._rows = rows or {}

    def layer(self, name: str, x: Tensor, base: Base, **convolution: Any) -> Tensor:
        """Output of layer `name` with the set on it.

        x: (rows, ..., in) for a linear layer; (rows, in, *space) for a convolution, whose stride, padding
        and dilation come as keywords. Computed in the dtype of x. A student is differentiable in x and in the
        coefficients and keeps nothing for backward but x; a teacher has no gradient.
        """
        update = Update(self._layers[name], convolution)
        if self._coefficients is not None:
            return frozen_with(x, base, update, self._coefficients[name])
        with torch.no_grad():
            y = base.forward(x)
            y_own = self.own(y)
            for concept, x_own in self.own(x).items():
                part = update.layer.parts.get(concept)
                if part is not None and len(x_own):
                    update.add(y_own[concept], x_own, update.layer.up[:, part], update.layer.down[part])
            return y

    def own(self, x: Tensor) -> dict[str, Tensor]:
        """Concept -> a teacher's rows of a layer's input, also where a model folds frames into rows."""
        ends = list(accumulate(self._rows.values(), initial=0))
        bounds = [len(x) * end // ends[-1] for end in ends]
        return {c: x[first:last] for c, first, last in zip(self._rows, bounds, bounds[1:], strict=False)}
