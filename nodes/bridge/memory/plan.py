"""What a run will need beside the weights, and how it is run so that it fits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management as management
import torch
from torch import Tensor

from ....ziplora_core.lora_set import LoRASet
from ....ziplora_core.solver import Settings
from ....ziplora_core.trained_lora import TrainedLoRA
from ..network.injection import blocks
from ..network.weights import compute_dtype
from . import rehearsal

GB = 1e9
_VECTORS = 8  # float32 vectors of all coefficients: the start, the step, its gradient, Adam's two, the mean, two more
_TRAINED = 20  # bytes for a number that is trained: float32 of itself, its gradient, Adam's two and its passing one
_TRAINING_IN_ALL = 11_200_000_000  # bytes, with the weights, where training can do with so much
_USED = 0.9  # of the room: allocators waste some
_BACKWARD = 3  # what a step takes and gives back, in parts of what a plain pass does: measured, see docs/performance.md


@dataclass(frozen=True)
class Plan:
    """How a run spends memory.

    together: the references of all concepts in one pass; None where there are none, in training. recomputed: of the
    transformer blocks, how many (from the first) are run again in backward instead of being kept. need, room: bytes
    beside the model's weights, estimated and there; 0 where unknown. concepts: how many of them have references.
    """

    together: bool | None = True
    recomputed: int = 0
    blocks: int = 0
    need: int = 0
    room: int = 0
    concepts: int = 2

    def line(self) -> str:
        every = "both" if self.concepts == 2 else "all"
        ways = {True: f"{every} references in one pass", False: "one reference at a time", None: ""}
        again = f"{self.recomputed} of {self.blocks} transformer blocks run again in backward" if self.blocks else ""
        how = ", ".join(filter(None, [ways[self.together], again]))
        room = f"memory: about {self.need / GB:.1f} of {self.room / GB:.1f} GB beside the weights"
        return "; ".join(filter(None, [room, how]))

    def least(self) -> Plan | None:
        """What needs least, for a second try; None where this is it."""
        least = replace(self, together=self.together and False, recomputed=self.blocks)
        return None if self == least else least


def _workspace(base, dtype: torch.dtype, positions: int) -> int:
    """Bytes that a pass takes and gives back, by the host's own rule for attention that keeps no scores, as ours is."""
    return int(positions * dtype.itemsize * 0.01 * base.memory_usage_factor * 2**20)


def make(
    model, loras: LoRASet, conditioning: dict[str, list], latents: dict[str, Tensor], settings: Settings, room: int
) -> Plan:
    """The fastest way that fits into `room` bytes, or the smallest where none does."""
    rows, concepts = settings.batch_size, len(loras.concepts)
    largest = max(latents.values(), key=lambda samples: samples[0].numel())
    dtype = compute_dtype(model.model)
    workspace = _workspace(model.model, dtype, rows * largest[0, 0].numel())
    factors = sum(f.up.numel() + f.down.numel() for layer in loras.layers.values() for f in layer.values())
    fixed = factors * dtype.itemsize + _VECTORS * 4 * loras.coefficient_count
    spend = int(_USED * room)
    before = fixed + concepts * workspace
    if not settings.gradient_steps:
        return Plan(need=before, room=room, concepts=concepts)
    rehearsed = _estimate(lambda: rehearsal.rehearse(model, loras, conditioning, latents))
    if rehearsed is None:
        count = len(blocks(model.model))
        return Plan(True, count, count, max(before, fixed + 2 * concepts * workspace), room, concepts)
    count = len(rehearsed.inside)

    def plan(together: bool, recomputed: int) -> Plan:
        passes = concepts if together else 1
        step = fixed + passes * (_BACKWARD * workspace + rows * (rehearsed.kept(recomputed) + rehearsed.largest))
        return Plan(together, recomputed, count, max(before, step), room, concepts)

    ways = (plan(together, recomputed) for together in (True, False) for recomputed in range(count + 1))
    return next((way for way in ways if way.need <= spend), plan(False, count))


def make_for_training(
    model,
    shapes: dict[str, tuple[int, int]],
    conditioning: list,
    latents: Tensor,
    rank: int,
    rows: int,
    room: int,
    is_whole: bool = False,
) -> Plan:
    """As `make`, for training a LoRA of these layers, layer -> (out, in). latents: the largest, (1, C, *space).
    is_whole: not of a rank, but all numbers of these layers are trained."""
    dtype = compute_dtype(model.model)
    numbers = sum(out * columns if is_whole else rank * (out + columns) for out, columns in shapes.values())
    fixed = _TRAINED * numbers
    workspace = _workspace(model.model, dtype, rows * latents[0, 0].numel())
    with torch.inference_mode(False):
        trained = TrainedLoRA(shapes, rank, 0, "meta")
    rehearsed = _estimate(lambda: rehearsal.rehearse_training(model, conditioning, latents, trained))
    if rehearsed is None:
        count = len(blocks(model.model))
        return Plan(None, count, count, fixed + 4 * workspace, room)
    count = len(rehearsed.inside)

    def plan(recomputed: int) -> Plan:
        need = fixed + _BACKWARD * workspace + rows * (rehearsed.kept(recomputed) + rehearsed.largest)
        return Plan(None, recomputed, count, need, room)

    ways = [plan(recomputed) for recomputed in range(count + 1)]
    usable = int(_USED * room)
    modest = min(usable, _TRAINING_IN_ALL - model.model_size())  # a few blocks run again cost little
    fits = [[way for way in ways if way.need <= most] for most in (modest, usable)]
    return next((fitting[0] for fitting in fits if fitting), ways[-1])


def _estimate(rehearse: Callable[[], rehearsal.Rehearsal]) -> rehearsal.Rehearsal | None:
    try:
        return rehearse()
    except management.InterruptProcessingException:
        raise
    except Exception as error:  # of any model's own code: a run does not fail because it could not be estimated
        logging.warning("ZipLoRA: memory could not be estimated (%s: %s).", type(error).__name__, error)
        return None


def room_for(model) -> int:
    """Bytes on a model's device beside its weights, once the host has moved everything else away."""
    device = model.load_device
    free = management.get_free_memory(device)
    if device.type == "cpu":  # where nothing is moved away, and the weights are there already
        return int(free)
    free += sum(e.model_loaded_memory() for e in management.current_loaded_models if e.device == device)
    return max(0, int(free - model.model_size() - management.extra_reserved_memory()))


def taken_beside(model, others: Sequence[Any]) -> int:
    """Bytes of that room which the weights of other ModelPatchers take, loaded together with it."""
    if model.load_device.type == "cpu":
        return 0
    return int(sum(other.model_size() for other in others if other.load_device == model.load_device))
