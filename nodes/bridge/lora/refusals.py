"""Why a LoRA file cannot be used on a model, in a sentence that says what to do."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ....ziplora_core import formats
from ....ziplora_core.files import LoRAFileError, shown, unread
from . import base_models
from .loras import LoRASource

_KIN = ("Flux or Flux 2 or Chroma", "HunyuanVideo or HunyuanImage", "Anima or Cosmos Predict2")  # by the same names


class OtherModelError(LoRAFileError):
    """A file that was made for another model."""


def other_model(source: LoRASource, model, key: str, kind: str, shape: torch.Size) -> OtherModelError:
    """Its update of a layer, of that kind, does not fit a weight of that shape. model: the host's BaseModel."""
    looks = guess(source, base_models.model_family(model))
    return OtherModelError(
        f"'{source.title}' was made for another model{looks}: its {kind} at layer '{key}' does not fit a "
        f"weight of shape {tuple(shape)}; choose a LoRA of the same model family"
    )


def broken(source: LoRASource, key: str, why: str) -> LoRAFileError:
    return LoRAFileError(f"'{source.title}' is broken at layer '{key}': {why}; download it again")


def no_memory(source: LoRASource, key: str, kind: str, shape: torch.Size) -> MemoryError:
    """Its update of a layer, of that kind, could not be computed for a weight of that shape."""
    return MemoryError(
        f"there is not enough memory to compute the {kind} of '{source.title}' at layer '{key}', a weight of shape "
        f"{tuple(shape)}; close other programs, or use a smaller model or a LoRA of low rank"
    )


def is_of_memory(said: str) -> bool:
    """Whether an error's text is about memory that ran out, of a CPU or a GPU."""
    return re.search("out of memory|enough memory|allocate memory", said, re.IGNORECASE) is not None


@contextmanager
def logged() -> Iterator[list[str]]:
    """The errors that the host logs in this thread meanwhile: its adapters go on with the weight as it was then."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.thread == here:
                said.append(record.getMessage())

    here, listener, root = threading.get_ident(), Listener(logging.ERROR), logging.getLogger()
    root.addHandler(listener)
    try:
        yield said
    finally:
        root.removeHandler(listener)


def guess(source: LoRASource, own: str | None = None) -> str:
    """The model families that a file looks like, in brackets; empty where none is known. own: that it cannot be of."""
    families = [family for family in (formats.looks_like(source.tensors) or "").split(" or ") if family != own]
    return f" (it looks like a LoRA for {' or '.join(families)})" if any(families) else ""


def nothing_fits(source: LoRASource, model, unused: Sequence[str], zero: Sequence[str]) -> LoRAFileError:
    """No layer of a file changes the model. model: the host's BaseModel. unused: tensors that fit no layer. zero:
    layers whose update is zero."""
    kind = formats.unread_kind(source.tensors)
    if kind is not None:
        return LoRAFileError(unread(source.title, *kind))
    if zero:
        return LoRAFileError(f"'{source.title}' changes nothing: its {len(zero)} updates are zero; choose another file")
    example = shown(unused[0] if unused else next(iter(source.tensors), "no tensor at all"))
    family, own = formats.looks_like(source.tensors), base_models.model_family(model)
    if family and (family == own or (family in _KIN and own in family.split(" or "))):
        return LoRAFileError(
            f"'{source.title}' looks like a LoRA for {own}, as this model is, but calls its layers by names that "
            f"are not known here, e.g. '{example}'; have its trainer write kohya's or diffusers' names"
        )
    return OtherModelError(
        f"'{source.title}' has no layer that fits this model ({type(model).__name__}){guess(source, own)}: "
        f"found e.g. '{example}'; choose a LoRA of the same model family"
    )
