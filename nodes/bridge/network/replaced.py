"""A module's forward, replaced for a while beside other packs that replace it too."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor


def is_replaced(module: torch.nn.Module) -> bool:
    """Whether another pack has replaced the module's forward: some put the class's own back as if it were one."""
    own = module.__dict__.get("forward")
    return own is not None and own != type(module).forward.__get__(module)


class Replaced:
    """A module's forward until its end; after that, only a way through to the forward that was there before.

    Another pack may have wrapped this one and keep it for longer than it is of use, or put it back.
    """

    def __init__(self, module: torch.nn.Module, forward: Callable[..., Tensor]):
        self._module, self._forward = module, forward
        self._wrapped, self._previous = module.forward, module.__dict__.get("forward")
        module.forward = self

    def __call__(self, *args, **kwargs) -> Tensor:
        return self._forward(*args, **kwargs)

    def end(self) -> None:
        self._forward = self._after_the_end

    def restore(self) -> bool:
        """Whether it was the module's forward until now, which is the one from before again."""
        if self._module.__dict__.get("forward") is not self:
            return False
        if self._previous is None:
            del self._module.forward
        else:
            self._module.forward = self._previous
        return True

    def _after_the_end(self, *args, **kwargs) -> Tensor:
        self.restore()
        return self._wrapped(*args, **kwargs)


@contextlib.contextmanager
def replacing(forwards: Iterable[tuple[torch.nn.Module, Callable[..., Tensor]]]) -> Iterator[None]:
    """Modules with these forwards meanwhile, each replaced before the next one is asked for."""
    put: list[Replaced] = []
    try:
        for module, forward in forwards:
            put.append(Replaced(module, forward))
        yield
    finally:
        for mine in reversed(put):
            mine.end()
            mine.restore()
