"""What a pass will keep for backward, estimated before anything is loaded, on a copy without memory.

The pass is rehearsed on torch's meta device: what autograd would keep is counted tensor by tensor, whatever the model
family.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ....ziplora_core.branch import JoinedSet
from ....ziplora_core.lora_set import Factors, LoRASet
from ....ziplora_core.solver import Batch
from ....ziplora_core.trained_lora import TrainedLoRA
from ..network import predictor, session
from ..network.bare import bare
from ..network.differentiable import with_gradient
from ..network.injection import Injection, blocks
from ..network.weights import compute_dtype

_PROMPT = "prompt"  # of the one that is trained on
_ENDLESS = 1 << 50


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
    """A tensor of the same shape and dtype without memory."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _meta_loras(loras: LoRASet) -> LoRASet:
    def emptied(factors: Factors) -> Factors:
        return Factors(_meta(factors.up), _meta(factors.down), factors.scale)

    layers = {name: {c: emptied(f) for c, f in layer.items()} for name, layer in loras.layers.items()}
    return LoRASet(loras.concepts, layers)


class _AsWithMemory(TorchFunctionMode):
    """Attention without memory as devices with memory do it: torch's own way there would keep every score."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args[0].is_meta and not kwargs.get("enable_gqa"):
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args[:3])[0]
        return func(*args, **kwargs)


@contextlib.contextmanager
def _on_meta() -> Iterator[None]:
    """What hosts ask of a device that is none."""
    torch_itself: Any = torch
    autocast, free = torch.autocast, comfy.model_management.get_free_memory

    def without(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return contextlib.nullcontext() if device_type == "meta" else autocast(device_type, *args, **kwargs)

    def endless(device: Any = None, torch_free_too: bool = False) -> Any:
        if getattr(device, "type", None) != "meta":
            return free(device, torch_free_too)
        return (_ENDLESS, _ENDLESS) if torch_free_too else _ENDLESS

    torch_itself.autocast, comfy.model_management.get_free_memory = without, endless
    try:
        yield
    finally:
        torch_itself.autocast, comfy.model_management.get_free_memory = autocast, free


class _WithoutMemory:
    """Beside a Network of the bridge: its attention."""

    @staticmethod
    def attention(*args: Any, **kwargs: Any) -> Tensor:
        return session.attention_with_gradient(*args, **kwargs)


class _Network(_WithoutMemory, session.Network):
    pass


class _Predictor(_WithoutMemory, predictor.HostPredictor):
    pass


def _fill(empty: torch.nn.Module, model: torch.nn.Module) -> None:
    """Parameters of a BaseModel in its copy without memory, where the host makes them only as it loads a file: of
    quantized layers, and of all linear ones where it pages weights."""
    for path, module in bare(model).named_modules():
        twin = empty.get_submodule(path)
        for name, parameter in module.named_parameters(recurse=False):
            if getattr(twin, name, None) is None:
                setattr(twin, name, torch.nn.Parameter(_meta(parameter), requires_grad=False))


class MetaModel:
    """A copy of a network on torch's meta device, for passes that compute nothing.

    model: ModelPatcher, unchanged. layers: those that an update is on. prompts: conditionings by name.
    """

    def __init__(self, model, layers: Iterable[str], prompts: dict[str, list]):
        with torch.inference_mode(False):
            self.base = model.model.model_config.get_model({}, device="meta").to("meta")
            if self.base.get_dtype() != model.model.get_dtype():
                self.base.to(model.model.get_dtype())
            _fill(self.base, model.model)
            self.base.requires_grad_(False)
            self.base.current_patcher = SimpleNamespace(
                apply_hooks=lambda hooks: {}, prepare_state=lambda sigma: None, is_dynamic=lambda: False
            )
            self.patcher = SimpleNamespace(model=self.base, load_device=torch.device("meta"))
            self.guider = SimpleNamespace(
                inner_model=self.base,
                model_patcher=self.patcher,
                conds={name: comfy.sampler_helpers.convert_cond(prompt) for name, prompt in prompts.items()},
            )
            self.injection = Injection(layers)

    @contextlib.contextmanager
    def injected(self, recomputed: int = 0) -> Iterator[None]:
        self.injection.recomputed = recomputed
        with self.injection.injected(self.base), torch.inference_mode(False), with_gradient():
            yield


class MetaSet(MetaModel):
    """A MetaModel with a set of LoRAs on it, their prompts and their references' shapes."""

    def __init__(self, model, loras: LoRASet, conditioning: dict[str, list], latents: dict[str, Tensor]):
        super().__init__(model, loras.layers, {concept: conditioning[concept] for concept in loras.concepts})
        with torch.inference_mode(False):
            self._latents = {c: _meta(latents[c][:1]).float() for c in loras.concepts}
            self.predict = _Predictor(self.guider, {}, self.injection, self._latents)
            self.joined = JoinedSet(_meta_loras(loras), "meta", compute_dtype(self.base))

    def batch(self, *concepts: str) -> Batch:
        """One row of each concept, in the set's order."""
        latents = torch.cat([self._latents[c] for c in concepts])
        indices = torch.tensor([self.joined.concepts.index(c) for c in concepts])
        return Batch(latents, latents, torch.zeros(len(concepts), dtype=torch.int64), indices)

    def coefficients(self) -> Tensor:
        return torch.empty(self.joined.loras.coefficient_count, device="meta", requires_grad=True)


def rehearse(model, loras: LoRASet, conditioning: dict[str, list], latents: dict[str, Tensor]) -> Rehearsal:
    """One row of the largest reference, as student of a set.

    Takes no memory and about a second for SDXL; raises whatever a model raises.
    """
    largest = max(latents, key=lambda c: latents[c][0].numel())
    meta = MetaSet(model, loras, conditioning, latents)

    def forward() -> None:
        meta.predict(meta.batch(largest), meta.joined.student(meta.coefficients()))

    return _rehearsed(meta, forward)


def rehearse_training(model, prompt: list, latents: Tensor, trained: TrainedLoRA) -> Rehearsal:
    """One row of latents (1, C, *space) with a LoRA on the meta device that is trained, whose own numbers are counted
    elsewhere; where it has no layers, it is the prompt that is trained."""
    meta = MetaModel(model, trained.down, {_PROMPT: prompt})
    with torch.inference_mode(False):
        row = _meta(latents[:1]).float()
        network = _Network(meta.guider, {}, meta.injection)
        encoded = network.encode(_PROMPT, row)
        parts = [getattr(part, "cond", None) for part in encoded.values()]
        for part in parts if not trained.down else ():
            if isinstance(part, Tensor) and part.is_floating_point():
                part.requires_grad_()

    def forward() -> None:
        conditioning = {k: v.process_cond(batch_size=1, area=None) for k, v in encoded.items()}
        x, sigma = network.noised(row, row, torch.zeros(1, dtype=torch.int64))
        x0 = network.denoised(x, sigma, comfy.samplers.cond_cat([conditioning]), trained.branch())
        network.raw(x, sigma, x0)

    return _rehearsed(meta, forward, trained.parameters())


def _rehearsed(meta: MetaModel, forward: Callable[[], None], elsewhere: Iterable[Tensor] = ()) -> Rehearsal:
    """What autograd would keep of a pass. elsewhere: tensors that are not counted."""
    kept = _Kept()
    for block in blocks(meta.base):
        block.register_forward_pre_hook(kept.enter, with_kwargs=True)
        block.register_forward_hook(kept.leave)
    meta.injection.seen = kept.save
    with (
        meta.injected(),
        _on_meta(),
        _AsWithMemory(),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(kept.save, lambda nothing: nothing),
    ):
        for tensor in elsewhere:
            kept.new_bytes(tensor)
        forward()
    return Rehearsal(kept.outside, kept.inputs, kept.inside)
