"""Gradients through the host's layers without ever keeping a weight.

The host's weights are inference tensors, may be fp8, quantized, patched by other LoRAs, or on another device.
Each layer therefore runs the host's own forward without gradient, and its backward casts the weight again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.rmsnorm
import torch
import torch.nn.functional as F
import torch.nn.grad
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ....ziplora_core.branch import Branch
from ....ziplora_core.frozen import Base, frozen
from ....ziplora_core.training import Adapted
from .differentiable import adds_in_place, copying
from .experts import is_mixture, over_all
from .foreign import Given, Rerun, run_again_in_backward
from .replaced import Replaced, is_replaced, replacing
from .weights import cast

_CONV_INPUT = {
    1: torch.nn.grad.conv1d_input,
    2: torch.nn.grad.conv2d_input,
    3: torch.nn.grad.conv3d_input,
}
_CONV = torch.nn.modules.conv._ConvNd
_BLOCKS = (  # transformer blocks of the host's networks
    "BasicTransformerBlock",
    "DoubleStreamBlock",
    "SingleStreamBlock",
    "JointBlock",
    "JointTransformerBlock",
    "QwenImageTransformerBlock",
    "WanAttentionBlock",
    "HiDreamImageTransformerBlock",
    "HiDreamImageSingleTransformerBlock",
    "HunYuanDiTBlock",
    "TextFusionBlock",
    "Block",  # of Cosmos Predict2 and Anima
)
_NORMS = (torch.nn.GroupNorm, torch.nn.LayerNorm, comfy.ops.disable_weight_init.RMSNorm)


class _Layer:
    """`Base` of the core: a layer of the host by its own forward; backward casts the weight again."""

    def __init__(self, module: torch.nn.Module, forward: Callable[[Tensor], Tensor]):
        self.module, self._forward = module, forward

    def forward(self, x: Tensor) -> Tensor:
        y = self._forward(x)  # of torch up to 2.11 a view of nothing else, which autograd lets nobody change in place
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y


class _Linear(_Layer):
    def backward(self, grad: Tensor, shape: torch.Size) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        with cast(self.module, grad) as (weight, _):
            return grad @ weight


class _Convolution(_Layer):
    def backward(self, grad: Tensor, shape: torch.Size) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        m = self.module
        with cast(m, grad) as (weight, _):
            return _CONV_INPUT[grad.ndim - 2](shape, weight, grad, m.stride, m.padding, m.dilation, m.groups)


def _norm(module: torch.nn.Module, x: Tensor, forward: Callable[[Tensor], Tensor], changes_inputs: bool) -> Tensor:
    """The module's own forward; where x needs a gradient, with copies of its few weights that autograd may keep."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        with torch.no_grad():
            return forward(x)
    if changes_inputs:  # autograd keeps x, which the block will add to in place
        x = x.clone()
    # The host's parameters ask for gradients: copied under grad they would collect one each, step after step.
    with torch.no_grad(), cast(module, x) as (weight, bias):
        weight = None if weight is None else weight.clone()
        bias = None if bias is None else bias.clone()
    if isinstance(module, torch.nn.GroupNorm):
        return F.group_norm(x, module.num_groups, weight, bias, module.eps)
    if isinstance(module, torch.nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)
    return comfy.rmsnorm.rms_norm(x, weight, module.eps)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and value.is_floating_point() else value


def _with_copies(module: torch.nn.Module, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A leaf of a kind that is not known here, as a model's own RMSNorm: autograd may keep copies of its numbers."""

    def run(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        own = module._parameters
        with torch.no_grad():
            copies: Any = {name: None if p is None else p.clone() for name, p in own.items()}  # plain tensors
            module._parameters = copies
        try:
            return forward(*args, **kwargs)
        finally:
            module._parameters = own

    return run


def convolution_options(module: torch.nn.Module) -> dict[str, Any]:
    return {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}


def is_convolution(module: torch.nn.Module) -> bool:
    return isinstance(module, _CONV) and not isinstance(module, torch.nn.modules.conv._ConvTransposeNd)


def is_linear(module: torch.nn.Module) -> bool:
    cast = isinstance(module, comfy.ops.CastWeightBiasOp) and hasattr(module, "in_features")
    return isinstance(module, torch.nn.Linear) or cast


def frozen_layers(
    network: torch.nn.Module, layers: Collection[str] = (), branch: Adapted | None = None
) -> AbstractContextManager[None]:
    """Any network whose linear layers keep no weight for backward; where another pack has replaced one, its own forward
    runs. layers: those (`….weight`) to which the branch is added."""

    def forwards() -> Iterator[tuple[torch.nn.Module, Callable[..., Tensor]]]:
        for path, module in network.named_modules():
            if not is_linear(module):
                continue
            name, base = f"{path}.weight", _Linear(module, module.forward)
            if branch is None or name not in layers:
                if not is_replaced(module):
                    yield module, partial(frozen, base=base)
            elif is_replaced(module):
                yield module, partial(_on_another, branch, name, module.forward)
            else:
                yield module, partial(branch.layer, name, base=base)

    return replacing(forwards())


def _on_another(branch: Adapted, name: str, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A branch beside the output of another pack's forward, through which the gradient flows too."""
    y = forward(x)
    return branch.layer(name, x, Given(y)) + (y - y.detach())


def blocks(model) -> list[torch.nn.Module]:
    """A BaseModel's transformer blocks, in the order in which they run."""
    return [module for module in model.diffusion_model.modules() if type(module).__name__ in _BLOCKS]


class Injection:
    """Freezes every layer of a model's network and adds a Branch to the layers of a set, while injected.

    Set `branch` before each forward pass; leave it until the backward pass is done, which may run blocks again.
    layers: names as in LoRASet (`diffusion_model.….weight`). recomputed: of how many transformer blocks, from the
    first, only the input is kept for backward, which runs them again. is_patched: whether others' code runs in a pass.
    seen: hears of what is kept where the blocks themselves see to it.

    The host never hears of it: it ejects injections in the order in which they came, and so puts the dead forward of
    one over the live one of another.
    """

    def __init__(self, layers: Iterable[str], recomputed: int = 0):
        self.branch: Branch | None = None
        self.recomputed = recomputed
        self.is_patched = False
        self.seen: Callable[[Tensor], None] = lambda _: None
        self._layers = set(layers)
        self._changes_inputs = True
        self._injected: list[Replaced] = []
        self._covered: list[Replaced] = []
        self._ran: set[int] = set()
        self._running: frozenset[int] | None = None

    @contextlib.contextmanager
    def injected(self, model: torch.nn.Module) -> Iterator[None]:
        """Inject into a BaseModel as it is now, with what others have injected; afterwards it is as it was.

        Raises ValueError where a layer of the pair is not one that can be injected.
        """
        self._running = None
        try:
            self._inject(model)
            yield
        finally:
            self._eject()
            self.branch = None

    def renew(self, model: torch.nn.Module) -> None:
        """Inject anew, where the host has just taken off and put back what others inject. Nothing when not injected."""
        if self._injected:
            self._eject()
            self._inject(model)

    def uncover(self) -> None:
        """Restore the modules that another pack had wrapped when this ended, and has freed since."""
        self._covered = [forward for forward in self._covered if not forward.restore()]

    def begin_pass(self) -> None:
        self._ran.clear()

    def check_pass(self) -> None:
        """Raises ValueError where the pass did not run the transformer blocks that the first one ran."""
        ran = frozenset(self._ran)
        self._running = self._running or ran
        missing = len(self._running - ran)
        if missing or not ran:
            skipped = "the network" if not ran else f"{missing} of its {len(self._running)} parts"
            raise ValueError(
                f"another node on the model answered a pass without running {skipped}, as caches do that make sampling "
                "faster; take it off the model that is connected here"
            )

    def _inject(self, model: torch.nn.Module) -> None:
        injected = set()
        # The U-Net adds to nothing that autograd keeps; the host's transformers add to a block's input in place.
        self._changes_inputs = not isinstance(model.diffusion_model, UNetModel)
        all_blocks = blocks(model)
        again = set(all_blocks[: self.recomputed])
        parts = {inner: number for number, block in enumerate(all_blocks, 1) for inner in block.modules()}
        for path, module in list(model.named_modules()):
            if not path.startswith("diffusion_model"):
                continue
            forward = self._checkpointed(module) if module in again else self._replacement(path, module)
            if forward is not None:
                if module not in again:
                    forward = self._noted(forward, parts.get(module, 0))
                self._injected.append(Replaced(module, forward))
                if is_convolution(module) or is_linear(module):
                    injected.add(f"{path}.weight")
        missing = sorted(self._layers - injected)
        if missing:
            raise ValueError(
                f"{len(missing)} layers of the pair are of a kind that cannot be zipped, e.g. '{missing[0]}'; "
                "use LoRAs that change linear and convolution layers"
            )

    def _eject(self) -> None:
        """The module's forward is restored only where it is still this one: what others put over it is theirs."""
        while self._injected:
            forward = self._injected.pop()
            forward.end()
            if not forward.restore():
                self._covered.append(forward)

    def _noted(self, forward: Callable[..., Tensor], part: int) -> Callable[..., Tensor]:
        def run(*args, **kwargs):
            self._ran.add(part)
            return forward(*args, **kwargs)

        return run

    def _replacement(self, path: str, module: torch.nn.Module) -> Callable[..., Tensor] | None:
        forward, name, replaced = module.forward, f"{path}.weight", is_replaced(module)
        if adds_in_place(module) and type(module).__name__ in _BLOCKS and not self.is_patched:
            return copying(forward, lambda tensor: self.seen(tensor))
        if is_mixture(module) and not replaced:
            return over_all(module)
        if is_convolution(module):
            options = convolution_options(module)
            plain = self._frozen(name, _Convolution(module, forward), options)
            return self._through(path, forward, plain, options) if replaced else plain
        if is_linear(module):
            plain = self._frozen(name, _Linear(module, forward), {})
            return self._through(path, forward, plain, {}) if replaced else plain
        if isinstance(module, _NORMS) and not replaced:
            return lambda x: _norm(module, x, forward, self._changes_inputs)
        leaf = next(module.children(), None) is None
        if leaf and any(p is not None for p in module._parameters.values()):
            return _with_copies(module, forward)
        return None

    def _frozen(self, name: str, base: Base, convolution: dict[str, Any]) -> Callable[[Tensor], Tensor]:
        if name not in self._layers:
            return lambda x: frozen(x, base)
        return lambda x: frozen(x, base) if self.branch is None else self.branch.layer(name, x, base, **convolution)

    def _through(
        self, path: str, forward: Callable[..., Tensor], plain: Callable[..., Tensor], convolution: dict[str, Any]
    ) -> Callable[[Tensor], Tensor]:
        """A layer with another pack's forward, whose gradient is not that of the layer's weight alone."""

        def run(x: Tensor) -> Tensor:
            if not (torch.is_grad_enabled() and x.requires_grad):
                return plain(x)
            y = Rerun.apply(x, forward, path)
            if self.branch is None or f"{path}.weight" not in self._layers:
                return y
            return self.branch.layer(f"{path}.weight", x, Given(y), **convolution) + (y - y.detach())

        return run

    def _checkpointed(self, block: torch.nn.Module) -> Callable[..., Tensor]:
        forward, is_changing = block.forward, self.is_patched or adds_in_place(block)

        def again(*args, **kwargs):
            """On copies: what is kept to run the block again must not be what the block adds to in place."""
            return forward(*map(_copied, args), **{name: _copied(value) for name, value in kwargs.items()})

        def run(*args, **kwargs):
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            if "transformer_options" in kwargs:  # the host rewrites this dict from block to block
                kwargs["transformer_options"] = dict(kwargs["transformer_options"])
            if is_changing:
                return run_again_in_backward(again, *args, **kwargs)
            return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        return run
