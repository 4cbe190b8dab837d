"""The host's fused kernels, which have no gradient, and blocks that change what autograd keeps: run so that they do."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from .foreign import CopyBeforeChange

_PLAIN = "comfy_kitchen.backends.eager.rope"  # the same functions of the same package, as compositions of torch's
_FUSED = ("apply_rope", "rms_rope")
_IN_PLACE = ("comfy.ldm.lightricks.model",)  # whose blocks add to their input, which their own layers have kept


@contextlib.contextmanager
def with_gradient() -> Iterator[None]:
    """Passes whose operations all have a gradient: newer hosts leave most of their fused kernels out of training, and
    the rest are replaced here. Older hosts have neither."""
    before = getattr(comfy.model_management, "in_training", None)
    if before is None:
        yield
        return
    comfy.model_management.in_training = True
    try:
        with _plain_kernels():
            yield
    finally:
        comfy.model_management.in_training = before


@contextlib.contextmanager
def _plain_kernels() -> Iterator[None]:
    quantization: Any = getattr(comfy, "quant_ops", None)
    fused = getattr(quantization, "ck", None)
    if fused is None:
        yield
        return
    try:
        plain: Any = importlib.import_module(_PLAIN)
    except ImportError:  # a host without the package has kernels of its own making, or a package of another age
        plain = None
    quantization.ck = _Kernels(fused, plain)
    try:
        yield
    finally:
        quantization.ck = fused


class _Kernels:
    """A package of kernels, of which those of rotary positions have a gradient where one is asked for."""

    def __init__(self, fused: Any, plain: Any):
        self._fused, self._plain = fused, plain

    def __getattr__(self, name: str) -> Any:
        fused, plain = getattr(self._fused, name), getattr(self._plain, name, None)
        if plain is None or not name.startswith(_FUSED) or name.endswith("_"):
            return fused

        def run(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return fused(*args, **kwargs)
            return plain(*map(_constant, args), **{k: _constant(v) for k, v in kwargs.items()})

        return run


def _constant(value: Any) -> Any:
    """Weights and inference tensors as copies, which autograd may keep; what has a history as it is."""
    if not isinstance(value, Tensor) or not (value.is_leaf or value.is_inference()):
        return value
    with torch.no_grad():
        return value.clone()


def adds_in_place(block: torch.nn.Module) -> bool:
    """Whether a block of the host's changes what its own layers have kept for backward."""
    return type(block).__module__ in _IN_PLACE


def copying(forward: Callable[..., Tensor], seen: Callable[[Tensor], None]) -> Callable[..., Tensor]:
    """Its forward, in which that is copied before it is changed. seen: hears of every tensor that is kept."""

    def run(*args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        copies = CopyBeforeChange(seen)
        with torch.autograd.graph.saved_tensors_hooks(copies.keep, copies.kept), copies:
            return forward(*args, **kwargs)

    return run
