"""The panels of ZippedLoRAReport: matplotlib, imported when something is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..ziplora_core import analysis
from ..ziplora_core.blocks import block_name
from ..ziplora_core.coefficients import Coefficients, owners
from ..ziplora_core.lora_set import LoRASet
from .bridge.progress.plots import BOTH, CONTENT, FRAME, GROUND, INK, STYLE, concept_colors

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANEL = (10.0, 4.2)  # inches
_DPI = 100
_INSIDE = 4  # lines of a legend that find room in a panel; more stand beside it


class Subject:
    """What is drawn: a set of LoRAs, its coefficients, the losses of the run where they are known, and whether ranks
    were mixed in the place of columns."""

    def __init__(
        self,
        loras: LoRASet,
        coefficients: Coefficients,
        losses: Mapping[str, Sequence[float]] | None,
        routed: bool = False,
    ):
        self.loras, self.coefficients, self.losses, self.routed = loras, coefficients, losses or {}, routed
        self.colors = concept_colors(loras.concepts)


def draw(subject: Subject, apart: bool) -> Tensor:
    """All panels in one picture, or each in one of its own: IMAGE (N, H, W, 3) in 0..1, float32.

    Raises ImportError, with what to do, where matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Zipped LoRA Report draws with matplotlib, which this ComfyUI has not: run `pip install matplotlib` with "
            "ComfyUI's own Python"
        ) from error
    groups: list[list[Callable[[Axes, Subject], None]]] = [[p] for p in PANELS] if apart else [PANELS]
    pictures = []
    for panels in groups:
        rows = -(-len(panels) // 2) if len(panels) > 1 else 1
        columns = min(2, len(panels))
        size = (_PANEL[0] * columns, _PANEL[1] * rows)
        figure = Figure(figsize=size, dpi=_DPI, facecolor=GROUND, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        for number, panel in enumerate(panels, 1):
            wide = number == len(panels) and len(panels) % 2 and columns > 1
            place = (number, number + 1) if wide else number
            panel(_dark(figure.add_subplot(rows, columns, place)), subject)
        canvas.draw()
        pictures.append(torch.from_numpy(np.asarray(canvas.buffer_rgba())[..., :3].astype(np.float32) / 255))
    return torch.stack(pictures)


def _dark(axes: Axes) -> Axes:
    axes.set_facecolor(GROUND)
    axes.tick_params(colors=INK, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_color(FRAME)
        spine.set_visible(side in ("left", "bottom"))
    return axes


def _label(axes: Axes, title: str, x: str, y: str, legend: bool = True) -> None:
    axes.set_title(title, color=INK, fontsize=12, loc="left")
    axes.set_xlabel(x, color=INK, fontsize=10)
    axes.set_ylabel(y, color=INK, fontsize=10)
    lines = len(axes.get_legend_handles_labels()[0])
    if legend and lines:
        place: dict[str, Any] = {"loc": "upper right", "fontsize": 9}
        if lines > _INSIDE:
            place = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "fontsize": 8}
        axes.legend(facecolor=GROUND, edgecolor=FRAME, labelcolor=INK, **place)


def _nothing(axes: Axes, title: str, why: str) -> None:
    _label(axes, title, "", "")
    axes.set_axis_off()
    axes.text(0.5, 0.5, why, color=INK, fontsize=11, ha="center", va="center", transform=axes.transAxes)


def _name_blocks(axes: Axes, layers: Sequence[str]) -> None:
    """The network's blocks on the axis instead of the layers' numbers, a line between two."""
    start, ticks = 0, []
    for name, members in groupby(layers, block_name):
        count = len(list(members))
        ticks.append((start + (count - 1) / 2, name))
        if start:
            axes.axvline(start - 0.5, color=FRAME, linewidth=0.6)
        start += count
    axes.set_xticks([x for x, _ in ticks], [name for _, name in ticks], rotation=35, ha="right", fontsize=8)
    axes.set_xlim(-0.5, max(start, 1) - 0.5)


def _nothing_shared(subject: Subject) -> str:
    words = {1: "one LoRA alone: there is no other to share a layer with", 2: "no layer is changed by both LoRAs"}
    return words.get(len(subject.colors), "no layer is changed by two of the LoRAs")


def _of_all(subject: Subject) -> str:
    return {1: "the LoRA's", 2: "the two LoRAs'"}.get(len(subject.colors), "the LoRAs'")


_ROUTED = "this merge has other rows: it has no coefficient for each column"


def interference(axes: Axes, subject: Subject) -> None:
    title = f"Interference of {_of_all(subject)} columns, layer by layer (as the paper's Fig. 3b)"
    if subject.routed:
        return _nothing(axes, title, _ROUTED)
    before = analysis.column_interference(subject.loras, Coefficients.ones(subject.loras))
    after = analysis.column_interference(subject.loras, subject.coefficients)
    if not before:
        return _nothing(axes, title, _nothing_shared(subject))
    layers = range(len(before))
    axes.plot(layers, list(before.values()), color=STYLE, linewidth=1.2, label="direct merge")
    axes.plot(layers, list(after.values()), color=CONTENT, linewidth=1.2, label="this merge")
    axes.set_ylim(bottom=0)
    _name_blocks(axes, list(before))
    _label(axes, title, "", "mean |cos · m_c · m_s|")


def elements(axes: Axes, subject: Subject) -> None:
    title = f"Elements of {_of_all(subject)} updates ΔW (the paper's Fig. 3a)"
    found = {concept: analysis.sampled_elements(subject.loras, concept) for concept in subject.colors}
    found = {concept: values for concept, values in found.items() if len(values)}
    width = max((values.double().square().mean().sqrt().item() for values in found.values()), default=0.0) * 6
    if not width:
        return _nothing(axes, title, "the LoRAs change nothing")
    for concept, values in found.items():
        counts = torch.histc(values, 121, -width, width) / len(values)
        share = analysis.energy_share(values, 0.1)
        label = f"{concept}: the largest 10 % hold {share:.0%} of the energy"
        axes.plot(
            np.linspace(-width, width, 121), counts.numpy(), color=subject.colors[concept], linewidth=1.2, label=label
        )
    axes.set_yscale("log")
    _label(axes, title, "value", "share of elements")


def losses(axes: Axes, subject: Subject) -> None:
    title = "Losses over the steps"
    known = subject.losses
    if not known.get("loss"):
        return _nothing(axes, title, "no losses: connect loss_map of ZipLoRA Optimize")
    if "left" in known:  # the layer-wise solve: one number for each layer
        axes.plot(list(known["left"]), color=CONTENT, linewidth=1.2)
        axes.set_ylim(bottom=0)
        return _label(axes, "What is left of each layer's error", "layer", "of the direct merge's", legend=False)
    curves = [(concept, color, concept) for concept, color in subject.colors.items() if concept in known]
    if not curves:  # of training: this pack's, or any other's
        title = "Training loss over the steps"
        curves = [("loss", CONTENT, "training loss")]
    if "overlap" in known:
        curves.append(("overlap", BOTH, "overlap x lambda"))
    steps = known.get("step") or range(1, len(known["loss"]) + 1)
    marker = "o" if len(steps) == 1 else None
    for name, colour, label in curves:
        axes.plot(steps, known[name], color=colour, linewidth=1.2, marker=marker, label=label)
    axes.set_ylim(bottom=0)
    _label(axes, title, "step", "loss")


def histogram(axes: Axes, subject: Subject) -> None:
    title = "Where the coefficients ended (1 is the direct merge)"
    if subject.routed:
        return _nothing(axes, title, _ROUTED)
    for name, by_layer in subject.coefficients.by_concept.items():
        values = torch.cat([torch.empty(0), *by_layer.values()])
        if len(values):
            counts = torch.histc(values, 101, -0.5, 2.0) / len(values)
            label = f"{name}: mean {values.mean():.2f}, {(values.abs() < 0.5).float().mean():.0%} below 0.5"
            axes.plot(
                np.linspace(-0.5, 2.0, 101), counts.numpy(), color=subject.colors[name], linewidth=1.2, label=label
            )
    axes.set_ylim(bottom=0)
    _label(axes, title, "coefficient", "share of columns")


def ownership(axes: Axes, subject: Subject) -> None:
    title = "Who owns the columns of each layer (|coefficient| at least 0.5)"
    shares = subject.coefficients.ownership_by_layer()
    if subject.routed:
        return _nothing(axes, title, _ROUTED)
    if not shares:
        return _nothing(axes, title, _nothing_shared(subject))
    who = owners(subject.colors)
    stacks = [[layer[owner] for layer in shares.values()] for owner in who]
    colours = [*subject.colors.values(), BOTH, FRAME]
    axes.stackplot(np.arange(len(shares)), np.array(stacks), colors=colours, labels=who, step="mid", linewidth=0)
    axes.set_ylim(0, 1)
    _name_blocks(axes, list(shares))
    _label(axes, title, "", "share of columns")


PANELS: list[Callable[[Any, Subject], None]] = [interference, elements, losses, histogram, ownership]
