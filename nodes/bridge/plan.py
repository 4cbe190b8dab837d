"""What an optimisation will need beside the weights, found out before anything is loaded, and how it is run to fit.

The student's pass is rehearsed on a copy of the network without memory (torch's meta device): what autograd would
keep is counted tensor by tensor, whatever the model family.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, TypeVar

import comfy.model_management as management
import comfy.sampler_helpers
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...ziplora_core.branch import JoinedPair
from ...ziplora_core.layerwise import MOMENTS, moments_at_most
from ...ziplora_core.pair import Factors, LayerPair, LoRAPair
from ...ziplora_core.solver import Batch, References, Settings
from ...ziplora_core.trained_lora import TrainedLoRA
from . import predictor
from .bare import bare
from .frozen import Injection, blocks, with_gradient

T = TypeVar("T")
_GB = 1e9
_VECTORS = 8  # float32 vectors of all coefficients: the start, the step, its gradient, Adam's two, the mean, two more
_TRAINED = 20  # bytes for a number that is trained: float32 of itself, its gradient, Adam's two and its passing one
_TRAINING_IN_ALL = 11_200_000_000  # bytes, with the weights, where training can do with so much
_USED = 0.9  # of the room: allocators waste some
_BACKWARD = 3  # what a step takes and gives back, in parts of what a plain pass does: measured, see docs/performance.md
_MOST_MOMENTS = 6 * 2**30  # all of SDXL's at once


@dataclass(frozen=True)
class Rehearsal:
    """Bytes that one row of a student pass keeps for backward.

    outside: of everything but transformer blocks. inputs, inside: of each block, what is kept where it is run again
    in backward, and what else is kept where it is not.
    """

    outside: int
    inputs: list[int]
    inside: list[int]

    @property
    def largest(self) -> int:
        """Of a block; about what its gradients take while they are computed."""
        return max(self.inside, default=0)

    def kept(self, recomputed: int) -> int:
        """Where the first so many blocks are run again; with the largest of them, as it is being run."""
        again = max(self.inside[:recomputed], default=0)
        return self.outside + sum(self.inputs) + sum(self.inside[recomputed:]) + again


@dataclass(frozen=True)
class Plan:
    """How a run spends memory.

    together: both references in one pass; None where there is no pair of them, in training. recomputed: of the
    transformer blocks, how many (from the first) are run again in backward instead of being kept. moments: bytes
    for the layer-wise start. need, room: bytes beside the model's weights, estimated and there; 0 where unknown.
    """

    together: bool | None = True
    recomputed: int = 0
    blocks: int = 0
    moments: int = MOMENTS
    need: int = 0
    room: int = 0

    def line(self) -> str:
        passes = {True: "both references in one pass, ", False: "one reference at a time, ", None: ""}[self.together]
        again = f"{self.recomputed} of {self.blocks} transformer blocks run again in backward"
        return f"memory: about {self.need / _GB:.1f} of {self.room / _GB:.1f} GB beside the weights; {passes}{again}"

    def least(self) -> Plan | None:
        """What needs least, for a second try; None where this is it."""
        moments = min(self.moments, MOMENTS // 4)
        least = replace(self, together=self.together and False, recomputed=self.blocks, moments=moments)
        return None if self == least else least


@dataclass
class _Kept:
    """Storages that autograd would keep, each counted once, by the block in which it was first seen."""

    outside: int = 0
    inputs: list[int] = field(default_factory=list)
    inside: list[int] = field(default_factory=list)
    in_block: bool = False
    _seen: dict[int, Any] = field(default_factory=dict)  # kept alive, so that an address means one storage

    def new_bytes(self, tensor: Any) -> int:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            return 0
        storage = tensor.untyped_storage()
        if storage._cdata in self._seen:
            return 0
        self._seen[storage._cdata] = storage
        return storage.nbytes()

    def save(self, tensor: Tensor) -> None:
        """For autograd, which keeps nothing then: a step's own output in its hands would never be given back."""
        size = self.new_bytes(tensor)
        if self.in_block:
            self.inside[-1] += size
        else:
            self.outside += size

    def enter(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        self.inputs.append(sum(self.new_bytes(value) for value in (*args, *kwargs.values())))
        self.inside.append(0)
        self.in_block = True

    def leave(self, *_: Any) -> None:
        self.in_block = False


def _meta(tensor: Tensor) -> Tensor:
    """The same without memory."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _meta_pair(pair: LoRAPair) -> LoRAPair:
    def emptied(factors: Factors | None) -> Factors | None:
        return None if factors is None else Factors(_meta(factors.up), _meta(factors.down), factors.scale)

    return LoRAPair({k: LayerPair(emptied(v.content), emptied(v.style)) for k, v in pair.layers.items()})


class _FlashAttention(TorchFunctionMode):
    """Attention without memory as devices with memory do it: torch's own way there would keep every score."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args[0].is_meta and not kwargs.get("enable_gqa"):
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args[:3])[0]
        return func(*args, **kwargs)


class _Predictor(predictor.HostPredictor):
    @staticmethod
    def attention(*args: Any, **kwargs: Any) -> Tensor:
        with _FlashAttention():
            return predictor.attention_with_gradient(*args, **kwargs)


def _fill(empty: torch.nn.Module, model: torch.nn.Module) -> None:
    """Parameters of a BaseModel in its copy without memory, where the host makes them only as it loads a file: of
    quantised layers, and of all linear ones where it pages weights."""
    for path, module in bare(model).named_modules():
        twin = empty.get_submodule(path)
        for name, parameter in module.named_parameters(recurse=False):
            if getattr(twin, name, None) is None:
                setattr(twin, name, torch.nn.Parameter(_meta(parameter), requires_grad=False))


class Stage:
    """A network without memory with a pair on it, for passes that compute nothing. model: ModelPatcher, unchanged."""

    def __init__(self, model, pair: LoRAPair, conditioning: dict[str, list], latents: dict[str, Tensor]):
        with torch.inference_mode(False):
            self.base = model.model.model_config.get_model({}, device="meta").to("meta")
            if self.base.get_dtype() != model.model.get_dtype():
                self.base.to(model.model.get_dtype())
            _fill(self.base, model.model)
            self.base.current_patcher = SimpleNamespace(
                apply_hooks=lambda hooks: {}, prepare_state=lambda sigma: None, is_dynamic=lambda: False
            )
            self.patcher = SimpleNamespace(model=self.base, load_device=torch.device("meta"))
            self._latents = {c: _meta(samples[:1]).float() for c, samples in latents.items()}
            guider = SimpleNamespace(
                inner_model=self.base,
                model_patcher=self.patcher,
                conds={c: comfy.sampler_helpers.convert_cond(conditioning[c]) for c in ("content", "style")},
            )
            self.injection = Injection(pair.layers)
            self.predict = _Predictor(guider, {}, self.injection, References(**self._latents))
            self.joined = JoinedPair(_meta_pair(pair), "meta", predictor.compute_dtype(self.base))

    @contextlib.contextmanager
    def injected(self, recomputed: int = 0) -> Iterator[None]:
        self.injection.recomputed = recomputed
        with self.injection.injected(self.base), torch.inference_mode(False), with_gradient():
            yield

    def batch(self, *concepts: str) -> Batch:
        """One row of each concept."""
        latents = torch.cat([self._latents[c] for c in concepts])
        is_style = torch.tensor([c == "style" for c in concepts])
        return Batch(latents, latents, torch.zeros(len(concepts), dtype=torch.int64), is_style)

    def coefficients(self) -> Tensor:
        return torch.empty(self.joined.pair.coefficient_count, device="meta", requires_grad=True)


def rehearse(
    model,
    pair: LoRAPair,
    conditioning: dict[str, list],
    latents: dict[str, Tensor],
    trained: TrainedLoRA | None = None,
) -> Rehearsal:
    """One row of the larger reference, as student of the pair, or with a LoRA without memory that is trained.

    Takes no memory and about a second for SDXL; raises whatever a model raises.
    """
    largest = max(latents, key=lambda c: latents[c][0].numel())
    stage, kept = Stage(model, pair, conditioning, latents), _Kept()
    for block in blocks(stage.base):
        block.register_forward_pre_hook(kept.enter, with_kwargs=True)
        block.register_forward_hook(kept.leave)
    with (
        stage.injected(),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(kept.save, lambda nothing: nothing),
    ):
        if trained is not None:
            for parameter in trained.parameters():  # counted elsewhere
                kept.new_bytes(parameter)
        branch = trained.branch() if trained is not None else stage.joined.student(stage.coefficients())
        stage.predict(stage.batch(largest), branch)
    return Rehearsal(kept.outside, kept.inputs, kept.inside)


def _workspace(base, dtype: torch.dtype, positions: int) -> int:
    """Bytes that a pass takes and gives back, by the host's own rule for attention that keeps no scores, as ours is."""
    return int(positions * dtype.itemsize * 0.01 * base.memory_usage_factor * 2**20)


def make(
    model, pair: LoRAPair, conditioning: dict[str, list], latents: dict[str, Tensor], settings: Settings, room: int
) -> Plan:
    """The fastest way that fits into `room` bytes, or the smallest where none does."""
    rows = settings.batch_size
    largest = max(latents.values(), key=lambda samples: samples[0].numel())
    dtype = predictor.compute_dtype(model.model)
    workspace = _workspace(model.model, dtype, rows * largest[0, 0].numel())
    factors = sum(f.up.numel() + f.down.numel() for layer in pair.layers.values() for _, f in layer.halves())
    fixed = factors * dtype.itemsize + _VECTORS * 4 * pair.coefficient_count
    spend = int(_USED * room)
    moments = min(max(spend - fixed - 2 * workspace, MOMENTS // 4), _MOST_MOMENTS, moments_at_most(pair))
    before = fixed + 2 * workspace + (0 if settings.solver == "gradient" else moments)
    if not settings.gradient_steps:
        return Plan(moments=moments, need=before, room=room)
    rehearsed = _rehearse_or_none(model, pair, conditioning, latents)
    if rehearsed is None:
        count = len(blocks(model.model))
        return Plan(True, count, count, MOMENTS, max(before, fixed + 4 * workspace), room)
    count = len(rehearsed.inside)

    def plan(together: bool, recomputed: int) -> Plan:
        passes = 2 if together else 1
        step = fixed + passes * (_BACKWARD * workspace + rows * (rehearsed.kept(recomputed) + rehearsed.largest))
        return Plan(together, recomputed, count, moments, max(before, step), room)

    ways = (plan(together, recomputed) for together in (True, False) for recomputed in range(count + 1))
    return next((way for way in ways if way.need <= spend), plan(False, count))


def make_for_training(
    model, shapes: dict[str, tuple[int, int]], conditioning: list, latents: Tensor, rank: int, rows: int, room: int
) -> Plan:
    """The same for training a LoRA of these layers, layer -> (out, in). latents: the largest, (1, C, *space)."""
    dtype = predictor.compute_dtype(model.model)
    numbers = sum(rank * (out + columns) for out, columns in shapes.values())
    fixed = _TRAINED * numbers
    workspace = _workspace(model.model, dtype, rows * latents[0, 0].numel())
    on_meta = {
        name: LayerPair(
            content=Factors(torch.empty(out, rank, device="meta"), torch.empty(rank, columns, device="meta"))
        )
        for name, (out, columns) in shapes.items()
    }
    prompts, pictures = (dict.fromkeys(("content", "style"), given) for given in (conditioning, latents))
    with torch.inference_mode(False):
        trained = TrainedLoRA(shapes, rank, 0, "meta")
    rehearsed = _rehearse_or_none(model, LoRAPair(on_meta), prompts, pictures, trained)
    if rehearsed is None:
        count = len(blocks(model.model))
        return Plan(None, count, count, 0, fixed + 4 * workspace, room)
    count = len(rehearsed.inside)

    def plan(recomputed: int) -> Plan:
        need = fixed + _BACKWARD * workspace + rows * (rehearsed.kept(recomputed) + rehearsed.largest)
        return Plan(None, recomputed, count, 0, need, room)

    ways = [plan(recomputed) for recomputed in range(count + 1)]
    usable = int(_USED * room)
    modest = min(usable, _TRAINING_IN_ALL - model.model_size())  # a few blocks run again cost little
    fits = [[way for way in ways if way.need <= most] for most in (modest, usable)]
    return next((found[0] for found in fits if found), ways[-1])


def _rehearse_or_none(
    model,
    pair: LoRAPair,
    conditioning: dict[str, list],
    latents: dict[str, Tensor],
    trained: TrainedLoRA | None = None,
) -> Rehearsal | None:
    try:
        return rehearse(model, pair, conditioning, latents, trained)
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


_LESS = (
    "connect smaller latents (drawn_size where none are connected), lower batch_size, or choose solver 'layerwise', "
    "which needs no backward pass"
)


def carry_out(plan: Plan, attempt: Callable[[Plan], T], what: str = "zip", less: str = _LESS) -> tuple[Plan, T]:
    """Run it; where memory runs out, once more with the least. Returns the plan that worked, and what it gave.

    what, less: for the message when that is not enough either: what was tried, and what would need less. Raises
    what `attempt` raised; out of memory for good, the same kind of exception with what to change.
    """
    for planned in (plan, plan.least()):
        if planned is None:
            break
        if planned is not plan:
            logging.warning("ZipLoRA: out of memory; once more with the least.")
            management.soft_empty_cache()
        logging.info("ZipLoRA: %s.", planned.line())
        try:
            return planned, attempt(planned)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            kind = type(error)  # and not the error, whose frames hold what filled the memory
    raise kind(
        f"not enough memory to {what}: about {plan.need / _GB:.1f} GB are needed beside the model, "
        f"{plan.room / _GB:.1f} GB were there; {less}"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """The host's own exception for it, or a device's that has none of its own. Newer hosts know more of them."""
    known = getattr(management, "is_oom", None)
    if known is not None and known(error):
        return True
    if management.OOM_EXCEPTION is not Exception and isinstance(error, management.OOM_EXCEPTION):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ("out of memory", "can't allocate"))
