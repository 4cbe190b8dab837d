"""Host extension of the tests: strikes a run where a graph says, through what other packs use, and looks what is left.

InjectFault passes on what comes in; a MODEL as a clone that carries the fault. GET /faults says what a run has left
behind; POST /faults/open ends a wait.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import comfy.model_management as management
import comfy.utils
import torch
from aiohttp import web
from comfy.comfy_types import IO
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, PatcherInjection, WrappersMP
from server import PromptServer
from torch.autograd.function import BackwardCFunction

ACTS = ("out of memory", "error", "not finite", "wait")
_OPEN = threading.Event()
_PATIENCE = 60.0  # seconds of a wait that nobody ends


class OtherPackError(RuntimeError):
    """What another pack's code raises."""


@dataclass
class Fault:
    """Counts the calls at one place and acts at one of them, or from it on."""

    place: str
    act: str
    at: int
    always: bool
    calls: int = 0

    def __call__(self, value: Any = None) -> Any:
        """Returns the value, spoilt where that is the act."""
        self.calls += 1
        if self.calls < self.at or (self.calls > self.at and not self.always):
            return value
        if self.act == "out of memory":
            raise management.OOM_EXCEPTION("Allocation on device")
        if self.act == "error":
            raise OtherPackError(f"another pack's {self.place} broke at call {self.calls}")
        if self.act == "not finite":
            return value * float("nan")
        PromptServer.instance.send_sync("faults", {"place": self.place, "call": self.calls})
        end = time.monotonic() + _PATIENCE
        while not (_OPEN.is_set() or management.processing_interrupted()) and time.monotonic() < end:
            time.sleep(0.01)
        _OPEN.clear()
        return value


def _passes(model: ModelPatcher, fault: Fault, wanted: Callable[[], bool]) -> None:
    """The network's forward passes that are wanted."""

    def wrapper(executor, *args, **kwargs):
        if not wanted():
            return executor(*args, **kwargs)
        return fault(executor(*args, **kwargs))

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "faults", wrapper)


def _any_pass(model: ModelPatcher, fault: Fault) -> None:
    _passes(model, fault, lambda: True)


def _pass_without_gradient(model: ModelPatcher, fault: Fault) -> None:
    _passes(model, fault, lambda: not torch.is_grad_enabled())


def _pass_with_gradient(model: ModelPatcher, fault: Fault) -> None:
    _passes(model, fault, torch.is_grad_enabled)


def _apply_model(model: ModelPatcher, fault: Fault) -> None:
    model.add_wrapper_with_key(
        WrappersMP.APPLY_MODEL, "faults", lambda executor, *args, **kwargs: fault(executor(*args, **kwargs))
    )


def _function_wrapper(model: ModelPatcher, fault: Fault) -> None:
    model.set_model_unet_function_wrapper(
        lambda apply, call: fault(apply(call["input"], call["timestep"], **call["c"]))
    )


def _hooked(model: ModelPatcher, hook: Callable) -> None:
    """A hook on a layer in the network's middle, while the clone is injected."""
    layer = model.model.diffusion_model.middle_block[1].transformer_blocks[0].attn1.to_out[0]
    handles: list[Any] = []

    def eject(_: ModelPatcher) -> None:
        while handles:
            handles.pop().remove()

    injection = PatcherInjection(inject=lambda _: handles.append(layer.register_forward_hook(hook)), eject=eject)
    model.set_injections("faults", [injection])


def _layer(model: ModelPatcher, fault: Fault) -> None:
    _hooked(model, lambda module, args, output: fault(output))


def _backward(model: ModelPatcher, fault: Fault) -> None:
    def hook(module, args, output):
        if output.requires_grad:
            output.register_hook(fault)

    _hooked(model, hook)


def _start(model: ModelPatcher, fault: Fault) -> None:
    """Loaded and injected, before the first pass."""
    model.add_callback_with_key(CallbacksMP.ON_PRE_RUN, "faults", lambda _: fault())


def _plan(model: ModelPatcher, fault: Fault) -> None:
    """Where a network without memory is made."""
    config = model.model.model_config

    def get_model(*args, **kwargs):
        del config.get_model
        fault()
        return config.get_model(*args, **kwargs)

    config.get_model = get_model


def _progress(_: Any, fault: Fault) -> None:
    """Where a bar is given a value, of which newer hosts send on a few a second."""
    update = comfy.utils.ProgressBar.update_absolute

    def counted(*args, **kwargs):
        if fault.calls + 1 >= fault.at:
            comfy.utils.ProgressBar.update_absolute = update
        fault()
        update(*args, **kwargs)

    comfy.utils.ProgressBar.update_absolute = counted


def _rename(_: Any, fault: Fault) -> None:
    """A file written whole, before it gets its name, whichever way that is given."""
    ways = {way: getattr(os, way) for way in ("replace", "link")}

    def counted(way: str):
        def named(*args, **kwargs):
            if fault.calls + 1 >= fault.at:
                for each, own in ways.items():
                    setattr(os, each, own)
            fault()
            ways[way](*args, **kwargs)

        return named

    for way in ways:
        setattr(os, way, counted(way))


ON_A_MODEL = {
    "any pass": _any_pass,
    "pass without gradient": _pass_without_gradient,
    "pass with gradient": _pass_with_gradient,
    "apply_model": _apply_model,
    "model_function_wrapper": _function_wrapper,
    "layer": _layer,
    "backward": _backward,
    "start": _start,
    "plan": _plan,
}
ANYWHERE = {"progress": _progress, "rename": _rename}


class InjectFault:
    """Everything after it runs anew each time it is queued."""

    RETURN_TYPES = (IO.ANY,)
    FUNCTION = "inject"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "value": (IO.ANY,),
                "place": ([*ON_A_MODEL, *ANYWHERE],),
                "act": (list(ACTS),),
                "at": ("INT", {"min": 1}),
                "always": ("BOOLEAN",),
            }
        }

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:
        return float("nan")

    def inject(self, value: Any, place: str, act: str, at: int, always: bool) -> tuple[Any]:
        _OPEN.clear()
        fault = Fault(place, act, at, always)
        if place in ANYWHERE:
            ANYWHERE[place](value, fault)
            return (value,)
        model = value.clone()
        ON_A_MODEL[place](model, fault)
        return (model,)


NODE_CLASS_MAPPINGS = {"InjectFault": InjectFault}


def _changed(modules: Iterable[tuple[str, torch.nn.Module]]) -> list[str]:
    """Modules whose forward is not their class's any more, or that carry a hook or a patch."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        name
        for name, module in modules
        if "forward" in vars(module)
        or any(getattr(module, hook) for hook in hooks)
        or getattr(module, "weight_function", None)
        or getattr(module, "bias_function", None)
    ]


def _digest(model: BaseModel) -> str:
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().contiguous().view(torch.uint8).numpy())
        digest.update(bytes([parameter.requires_grad, parameter.grad is not None]))
    return digest.hexdigest()


def _living(*kinds: type) -> list[list[Any]]:
    found: list[list[Any]] = [[] for _ in kinds]
    for thing in gc.get_objects():
        for kind, mine in zip(kinds, found, strict=True):
            if issubclass(type(thing), kind):
                mine.append(thing)
    return found


def left() -> dict[str, Any]:
    """What is alive in this process, after everything that nobody holds has been given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    models, patchers, tensors, steps = _living(BaseModel, ModelPatcher, torch.Tensor, BackwardCFunction)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if not t.is_meta}
    return {
        "networks": len(models),
        "changed": [name for model in models for name in _changed(model.named_modules())],
        "weights": [_digest(model) for model in models],
        "injected": sum(bool(p.injections or p.is_injected) for p in patchers),
        "tensors": len(tensors),
        "bytes": sum(storages.values()),
        "steps of a graph": len(steps),
    }


@PromptServer.instance.routes.get("/faults")
async def get_left(_: web.Request) -> web.Response:
    return web.json_response(left())


@PromptServer.instance.routes.post("/faults/open")
async def post_open(_: web.Request) -> web.Response:
    _OPEN.set()
    return web.json_response({})
