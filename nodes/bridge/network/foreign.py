"""What other packs and the host's own nodes put on a model: gradients through it, and what a run has to leave out.

Such code was written for sampling, where nothing has a gradient: it uses inference tensors, which autograd refuses to
keep, and changes in place what autograd keeps.
"""

from __future__ import annotations

import contextlib
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any
from weakref import WeakSet

import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from .replaced import is_replaced

# Wrappers that would do harm while a model is run for its gradient, by the key under which they are registered.
_LEFT_OUT = {
    "easycache": "EasyCache answers passes from what it remembers of others",
    "lazycache": "LazyCache answers passes from what it remembers of others",
    "torch.compile": "what torch.compile made cannot be given a gradient",
}
_WRAPPER_KINDS = [kind for name, kind in vars(WrappersMP).items() if name.isupper()]


def leave_out(patcher) -> None:
    """Take from a clone of the user's model what must not run while it is zipped or trained on, and say so in the log.

    patcher: ModelPatcher of this run alone.
    """
    for key, reason in _LEFT_OUT.items():
        if any(patcher.get_wrappers(kind, key) for kind in _WRAPPER_KINDS):
            for kind in _WRAPPER_KINDS:
                patcher.remove_wrappers_with_key(kind, key)
            _say_left_out(reason)
    compiled = [name for name, value in patcher.object_patches.items() if hasattr(value, "_orig_mod")]
    for name in compiled:
        del patcher.object_patches[name]
    if compiled:
        _say_left_out(_LEFT_OUT["torch.compile"])


def _say_left_out(reason: str) -> None:
    logging.warning("ZipLoRA: %s: left out here; the model keeps it for sampling.", reason)


def is_patched(patcher, model_options: dict) -> bool:
    """Whether anything but the host's own code may run in a pass. patcher: ModelPatcher, as loaded, without our own."""
    options = model_options.get("transformer_options", {})
    return bool(
        any(options.get(kind) for kind in ("patches", "patches_replace", "wrappers"))
        or model_options.get("model_function_wrapper")
        or getattr(patcher, "injections", None)
        or any(name.startswith("diffusion_model") for name in getattr(patcher, "object_patches", ()))
        or any(map(_has_other_code, patcher.model.diffusion_model.modules()))
    )


def _has_other_code(module: torch.nn.Module) -> bool:
    """Whether something was put on the module itself, beside the host's registers."""
    return is_replaced(module) or bool(module._forward_hooks or module._forward_pre_hooks)


@contextlib.contextmanager
def patched_pass(sigma: Tensor) -> Iterator[None]:
    """A forward pass in which others' code may use inference tensors and change in place what autograd keeps.

    sigma: (rows,). What they draw by chance (HyperTile's tiles, ToMe's tokens) is the same in each pass at these
    sigmas: of the teacher, of the student, and where a block is run again.
    """
    with contextlib.ExitStack() as stack:
        seed = int(sigma.sum().item() * 1e6) % 2**63
        on_cuda = sigma.device.type == "cuda"
        stack.enter_context(torch.random.fork_rng([torch.cuda.current_device()] if on_cuda else []))
        torch.default_generator.manual_seed(seed)
        if on_cuda:
            torch.cuda.manual_seed(seed)
        if torch.is_grad_enabled():
            copies = CopyBeforeChange()
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(copies.keep, copies.kept))
            stack.enter_context(copies)
            stack.enter_context(OrdinaryTensors())
        yield


class OrdinaryTensors(TorchFunctionMode):
    """Where an operation has a gradient, its inference tensors are replaced by copies, which autograd may keep."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_grad_enabled():
            leaves, structure = tree_flatten((args, kwargs))
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            inference = [t.is_inference() for t in tensors]
            if any(inference) and any(t.requires_grad and not i for t, i in zip(tensors, inference, strict=True)):
                args, kwargs = tree_unflatten([_ordinary(leaf) for leaf in leaves], structure)
        return func(*args, **kwargs)


def _ordinary(value: Any) -> Any:
    if not (isinstance(value, Tensor) and value.is_inference()):
        return value
    with torch.no_grad():
        return value.clone()


class _Cell:
    """One tensor that autograd keeps. Detached: an operation's own output would keep itself alive for ever."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor.detach()


class CopyBeforeChange(TorchDispatchMode):
    """What autograd keeps is copied just before something changes it in place.

    As torch's `allow_mutation_on_saved_tensors`, but for forward passes alone: that one has to hold the backward pass
    as well, here the whole run, and never forgets a step. seen: hears of every tensor that is kept, also of a copy.
    """

    def __init__(self, seen: Callable[[Tensor], None] = lambda _: None):
        super().__init__()
        self._seen = seen
        self._cells: defaultdict[int, WeakSet[_Cell]] = defaultdict(WeakSet)

    def keep(self, tensor: Tensor) -> _Cell:
        self._seen(tensor)
        cell = _Cell(tensor)
        self._cells[tensor.untyped_storage()._cdata].add(cell)
        return cell

    def kept(self, cell: _Cell) -> Tensor:
        return cell.tensor

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for index, name in _changed(func):
            value = args[index] if index < len(args) else kwargs.get(name)
            for tensor in value if isinstance(value, list | tuple) else [value]:
                if isinstance(tensor, Tensor):
                    for cell in self._cells.pop(tensor.untyped_storage()._cdata, ()):
                        cell.tensor = cell.tensor.clone()
                        self._seen(cell.tensor)
        return func(*args, **kwargs)


@cache
def _changed(func) -> list[tuple[int, str]]:
    """(position, name) of each argument that an operation writes to."""
    arguments = enumerate(func._schema.arguments)
    return [(i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]


def run_again_in_backward(forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """As torch's `checkpoint` without reentry: of what the call keeps for backward, nothing but its arguments is kept.

    That one keeps what the second run may yet change in place, and so gives wrong gradients without a word.
    """
    again = _Again(partial(forward, *args, **kwargs))
    with torch.autograd.graph.saved_tensors_hooks(again.leave, again.find):
        return forward(*args, **kwargs)


class _Again:
    def __init__(self, call: Callable[[], Tensor]):
        self._call, self._count = call, 0
        self._cells: list[_Cell] = []
        self._chance = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def leave(self, tensor: Tensor) -> int:
        self._count += 1
        return self._count - 1

    def find(self, number: int) -> Tensor:
        if not self._cells:
            self._run()
        return self._cells[number].tensor

    def _run(self) -> None:
        copies = CopyBeforeChange()

        def keep(tensor: Tensor) -> _Cell:
            self._cells.append(copies.keep(tensor))
            return self._cells[-1]

        with torch.random.fork_rng([] if self._cuda is None else [torch.cuda.current_device()]):
            torch.set_rng_state(self._chance)
            if self._cuda is not None:
                torch.cuda.set_rng_state(self._cuda)
            hooks = torch.autograd.graph.saved_tensors_hooks(keep, copies.kept)
            with torch.enable_grad(), hooks, copies, OrdinaryTensors():
                self._call()


class Rerun(torch.autograd.Function):
    """A layer whose forward another pack has replaced; it is run again for its gradient, so that nothing but its input
    is kept: its weight, copied for autograd, lives only as long as that layer's backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Callable[[Tensor], Tensor], path: str) -> Tensor:
        ctx.forward, ctx.path = forward, path
        ctx.save_for_backward(x)
        y = forward(x)
        return y.clone() if y._is_view() or y is x else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        comfy.model_management.throw_exception_if_processing_interrupted()
        (x,) = ctx.saved_tensors
        with torch.enable_grad(), OrdinaryTensors():
            x = x.detach().requires_grad_()
            y = ctx.forward(x)
            if not y.requires_grad:
                raise ValueError(
                    f"another node has replaced the layer '{ctx.path}' by one without a gradient; take it off the "
                    "model that is connected here"
                )
            (dx,) = torch.autograd.grad(y, x, grads[0])
        return dx, None, None


class Given:
    """`Base` of the core: a layer's output that is there already, whose gradient flows elsewhere."""

    def __init__(self, output: Tensor):
        self._output = output

    def forward(self, x: Tensor) -> Tensor:
        return self._output.detach().clone()

    def backward(self, grad: Tensor, shape: torch.Size) -> Tensor:
        return grad.new_zeros(shape)
