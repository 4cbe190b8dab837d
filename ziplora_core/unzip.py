"""UnZipLoRA (arXiv 2412.04465): a content LoRA and a style LoRA from one picture, trained together to stay apart.

Three separations, each of which can be left out:

- prompts: in cross-attention's keys and values y = W0·x(full) + ΔW_c·x(content) + ΔW_s·x(style); elsewhere both LoRAs
  see the same x.
- columns: each LoRA changes only columns that it was given. A run has periods; at the start of each a scoring step with
  every column on ranks them, and each LoRA gets its best share of those that nobody has, content first.
- blocks: layers that belong to one LoRA alone, all columns of them.

Over that, mergers m_c and m_s as ZipLoRA's: ΔW = ΔW_c·diag(m_c) + ΔW_s·diag(m_s), with an overlap loss.

Where paper and published code leave it open, what is chosen, and why (figures: docs/training.md):

- A column is an input feature, as in ZipLoRA, so that the result is a zipped pair (the code masks output features).
- The score of column j is Σ_i |W ⊙ δW|_ij (Cones, arXiv 2303.05125) with W = W0 + ΔW of this LoRA, and with δW what one
  step of plain gradient descent on the factors does to ΔW, to first order. So it is not zero at the start, where ΔW is,
  and the two LoRAs' differ although they see one gradient of W. In float32, from a whole batch.
- Layers of one LoRA's blocks have nothing of the other.
- The overlap counts each m on its own columns, so it acts where columns are shared, which column separation excludes.
  Counted on all columns, it drives both to zero before the LoRAs have learned anything, and leaves only the blocks.
- A half of the rows has one prompt for both LoRAs, a fifth an empty one (published code: none), since that is how they
  are drawn with: in a graph one prompt goes to all, and guidance subtracts what they draw for another. Without, what a
  prompt adds is learned too strongly, and guidance turns it into other colors.
- Outside a LoRA's columns its file holds zeros. The mergers go into the files, as published code does only for both
  together: without them, a LoRA draws less of what it learned. So the zipped pair's coefficients are one in a LoRA's
  own columns and zero elsewhere, and the two files can simply be added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from . import training
from .checks import Range
from .coefficients import Coefficients
from .files import all_finite
from .frozen import Base, frozen
from .lora_set import CONCEPTS, Factors, LoRASet
from .trained_lora import TrainedLoRA, check_fits

EMPTY = 0.2  # of the rows, where a LoRA is trained as it is used


def rows_as_used(example: training.Example, whole: int, empty: int) -> training.Pictures:
    """In turn with this example's prompt and with `whole`, one for both LoRAs; a share of them with an empty one.

    Columns are never scored without the example's own.
    """
    few = round(1 / EMPTY)
    sets = [
        [replace(example, prompt=p)] * (few - 1) + [replace(example, prompt=empty)] for p in (example.prompt, whole)
    ]
    return training.Pictures(sets, scored=example)


@dataclass(frozen=True)
class Settings(training.Settings):
    """The paper's. merger_rate: of the mergers. similarity_lambda: of their overlap. share: of a layer's columns that
    each LoRA gets in each of the periods."""

    steps: int = 600
    merger_rate: float = 5e-3
    similarity_lambda: float = 0.5
    share: float = 0.1
    periods: int = 3

    ranges: ClassVar[Mapping[str, Range]] = {
        **training.Settings.ranges,
        "merger_rate": Range(1e-8, 1.0),
        "similarity_lambda": Range(0.0, 1000.0),
        "periods": Range(1, 100),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        share_range(self.periods).check("share", self.share)


def share_range(periods: int) -> Range:
    """Of `Settings.share`: after all periods the two LoRAs have no more than all columns."""
    return Range(1e-3, 0.5 / periods)


@dataclass(frozen=True)
class Separations:
    """contexts: concept -> its prompt's context (1, tokens, width), for the layers in `prompted` and the rows with the
    prompt `parted`; None for one prompt.

    owners: layer -> the concept that alone changes it. columns: whether columns are given out.
    """

    contexts: Mapping[str, Tensor] | None = None
    prompted: Set[str] = frozenset()
    owners: Mapping[str, str] = field(default_factory=dict)
    columns: bool = True
    parted: int = 0


def own_layers(
    shapes: Mapping[str, tuple[int, int]], owners: Mapping[str, str]
) -> dict[str, dict[str, tuple[int, int]]]:
    """Concept -> the layers that its LoRA has, with their shapes: all but the other's own."""
    return {c: {n: shape for n, shape in shapes.items() if owners.get(n, c) == c} for c in CONCEPTS}


class UnZip:
    """Both LoRAs, their mergers and their columns: a Trainable.

    shapes: layer -> (out, in). weight: W0 of a layer, (out, in) float32 on the device, for scores.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        settings: Settings,
        apart: Separations,
        weight: Callable[[str], Tensor],
        device: torch.device | str = "cpu",
    ):
        self._settings, self._apart, self._weight = settings, apart, weight
        self.trained: dict[str, TrainedLoRA] = {}
        self.mergers: dict[str, dict[str, Tensor]] = {}
        self.masks: dict[str, dict[str, Tensor]] = {}
        self._every_column = not apart.columns
        for number, (concept, own) in enumerate(own_layers(shapes, apart.owners).items()):
            seed = settings.seed + number * 2**31  # of a seed, torch's generator looks at the low 32 bits alone
            self.trained[concept] = TrainedLoRA(own, settings.rank, seed, device)
            self.mergers[concept] = {n: torch.ones(s[1], device=device, requires_grad=True) for n, s in own.items()}
            whole = {n: not apart.columns or n in apart.owners for n in own}
            self.masks[concept] = {
                n: torch.full((own[n][1],), all_of_it, dtype=torch.bool, device=device)
                for n, all_of_it in whole.items()
            }
        self.common_layers = [name for name in shapes if name not in apart.owners]

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        factors = [p for trained in self.trained.values() for p in trained.parameters()]
        mergers = [m for by_layer in self.mergers.values() for m in by_layer.values()]
        return [{"params": factors, "lr": learning_rate}, {"params": mergers, "lr": self._settings.merger_rate}]

    def tensors(self) -> list[Tensor]:
        parts = [p for trained in self.trained.values() for p in trained.parameters()]
        return parts + [t for of in (self.mergers, self.masks) for by_layer in of.values() for t in by_layer.values()]

    def branch(self, rows: training.Rows | None = None) -> training.Adapted:
        contexts = self._apart.contexts
        if contexts is None or rows is None:
            return _Branch(self, None)
        device = contexts["content"].device
        return _Branch(self, torch.tensor([p == self._apart.parted for p in rows.prompts], device=device))

    def added(self, concept: str, name: str, x: Tensor) -> Tensor | None:
        """up · down · diag(m ⊙ mask) · x; None where this LoRA does nothing."""
        trained = self.trained[concept]
        if name not in trained.down:
            return None
        hidden = F.linear(x, (trained.down[name] * self._effective(concept, name)).to(x.dtype))
        return F.linear(hidden, trained.up[name].to(x.dtype))

    def _effective(self, concept: str, name: str) -> Tensor:
        """m ⊙ mask; m while columns are scored."""
        m = self.mergers[concept][name]
        return m if self._every_column else m * self.masks[concept][name]

    def context(self, concept: str, name: str, x: Tensor, parted: Tensor | None) -> Tensor:
        """What a LoRA sees where the layer sees x (rows, …): in parted rows (bool, one for each) its own prompt's."""
        contexts = self._apart.contexts
        if contexts is None or parted is None or name not in self._apart.prompted:
            return x
        return torch.where(parted[:, None, None], contexts[concept].to(x), x)

    def penalty(self) -> Tensor | None:
        """λ · mean over layers of mean |m_c ⊙ m_s|, each on its own columns; None where no column has two owners."""
        if not self.common_layers or self._apart.columns:
            return None
        content, style = (self.mergers[concept] for concept in CONCEPTS)
        products = [(content[n] * style[n]).abs().mean() for n in self.common_layers]
        return self._settings.similarity_lambda * torch.stack(products).mean()

    def largest(self) -> str | None:
        sizes = {(c, n): size for c, trained in self.trained.items() for n, size in trained.sizes().items()}
        concept, name = max(sizes, key=sizes.__getitem__)
        return f"{name} ({concept})" if sizes[concept, name] else None

    def before(self, step: int, probe: Callable[[], None]) -> None:
        """At the start of a period: give out columns."""
        settings = self._settings
        length = max(1, settings.steps // settings.periods)
        if not self._apart.columns or step % length or step >= length * settings.periods:
            return
        parameters = [p for group in self.groups(0.0) for p in group["params"]]
        for parameter in parameters:
            parameter.grad = None
        self._every_column = True
        try:
            probe()
        finally:
            self._every_column = False
        self._give_out(step // length + 1)
        for parameter in parameters:
            parameter.grad = None

    @torch.no_grad()
    def _give_out(self, period: int) -> None:
        """So many that each LoRA has its share for this period, the first being 1. Raises GradientNotFinite, before
        any is given."""
        found: dict[tuple[str, str], Tensor] = {}
        for name in self.common_layers:
            weight = self._weight(name)
            for concept in CONCEPTS:
                found[concept, name] = self.score(concept, name, weight)
                if not all_finite(found[concept, name]):
                    raise training.GradientNotFinite(
                        f"layer {name}: the gradient by which its columns are given out is not finite"
                    )
        for name in self.common_layers:
            for concept in CONCEPTS:
                taken = self.masks["content"][name] | self.masks["style"][name]
                scores = found[concept, name].masked_fill(taken, -1.0)
                mask = self.masks[concept][name]
                count = period * round(self._settings.share * len(scores)) - int(mask.sum())
                mask[scores.topk(max(0, min(count, int((~taken).sum())))).indices] = True

    @torch.no_grad()
    def score(self, concept: str, name: str, weight: Tensor) -> Tensor:
        """(columns,): Σ over rows of |W ⊙ δW| from the gradients of the factors. weight: W0."""
        trained, m = self.trained[concept], self.mergers[concept][name]
        up, down = trained.up[name], trained.down[name]
        d_up = torch.zeros_like(up) if up.grad is None else up.grad
        d_down = torch.zeros_like(down) if down.grad is None else down.grad
        change = (d_up @ down + up @ d_down) * m
        return ((weight + (up @ down) * m) * change).abs().sum(0)

    @torch.no_grad()
    def load(self, halves: Mapping[str, Mapping[str, Factors]]) -> None:
        """Go on from what `pair` returned (concept -> layer -> factors): columns that hold numbers are a LoRA's own,
        their mergers start from one again, and columns that nobody has are as the seed makes them.

        Raises ValueError where they have other layers or another rank.
        """
        for concept, trained in self.trained.items():
            check_fits(halves[concept], trained.down, self._settings.rank)
            for name, f in halves[concept].items():
                mask = self.masks[concept][name]
                mask |= (f.down != 0).any(0).to(mask.device)
                trained.up[name].copy_(f.up.float() * f.scale)
                trained.down[name].copy_(torch.where(mask, f.down.float().to(mask.device), trained.down[name]))

    @torch.no_grad()
    def pair(self) -> LoRASet:
        """The two LoRAs, on the CPU, with their mergers; zeros outside their columns."""
        layers: dict[str, dict[str, Factors]] = {}
        for concept, trained in self.trained.items():
            for name, factors in trained.factors().items():
                kept = self.mergers[concept][name].cpu() * self.masks[concept][name].cpu()  # a device may be full
                layers.setdefault(name, {})[concept] = Factors(factors.up, factors.down * kept)
        return LoRASet(CONCEPTS, layers)

    def coefficients(self) -> Coefficients:
        """Of that pair, on the CPU: one in a LoRA's columns, zero elsewhere."""
        return Coefficients({c: {n: m.cpu().float() for n, m in masks.items()} for c, masks in self.masks.items()})


class _Branch:
    """parted: the rows of a pass in which each LoRA sees its own prompt; None where none does."""

    def __init__(self, unzip: UnZip, parted: Tensor | None):
        self._unzip, self._parted = unzip, parted

    def layer(self, name: str, x: Tensor, base: Base, **_: Any) -> Tensor:
        y = frozen(x, base)
        for concept in CONCEPTS:
            added = self._unzip.added(concept, name, self._unzip.context(concept, name, x, self._parted))
            if added is not None:
                y = y + added
        return y
