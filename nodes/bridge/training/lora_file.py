"""The LoRA file of a training run: written on the way, told of, and gone on from."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress

import folder_paths
import torch
from torch import Tensor

from ....ziplora_core import export, trained_lora, training
from ....ziplora_core.files import read_metadata
from ....ziplora_core.lora_set import Factors
from ....ziplora_core.writing import write_tensors
from ..disk import paths
from ..lora import keys, loras


def named_tensors(
    factors: Mapping[str, Factors], names: Mapping[str, str], dtype: torch.dtype = torch.float16
) -> dict[str, Tensor]:
    """In kohya's form, with alpha = rank. names: what the file calls each layer."""
    layers = {
        names[layer]: export.rounded(layer, export.ExportLayer(f.up * f.scale, f.down), dtype)
        for layer, f in factors.items()
    }
    return export.kohya_tensors(layers)


def lora_tensors(model, factors: dict[str, Factors], dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """Of a network, in kohya's names."""
    names = keys.file_names(model.model)
    return named_tensors(factors, {layer: names.kohya(layer) for layer in factors}, dtype)


def about_network(rank: int) -> dict[str, str]:
    """Metadata as trainers write it."""
    return {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(rank)}


class File:
    """One LoRA file of a run, written again and again, whole or not at all. Its name is chosen once; where another
    program has it by the first time that this is written, it is the next one.

    folder: that it is in, the output folder unless said. steps: how many the file has; it is never replaced by one with
    fewer. tensors: what was to be written last, also where the disk did not take it.
    """

    def __init__(self, model, prefix: str, about: dict[str, str], folder: str | None = None):
        self.model, self.about, self.steps = model, about, 0
        self.tensors: dict[str, Tensor] = {}
        self.folder = folder or folder_paths.get_output_directory()
        self.path = paths.reserve(prefix, self.folder, ".safetensors")

    @property
    def name(self) -> str:
        return os.path.relpath(self.path, self.folder)

    @property
    def written(self) -> str:
        """Its name; empty where the disk has taken nothing."""
        return self.name if self.steps else ""

    def lora_name(self) -> str | None:
        """As the host lists it among its LoRAs; None where the file lies in no loras folder."""
        own = os.path.realpath(self.path)
        for folder in map(os.path.realpath, folder_paths.get_folder_paths("loras")):
            if own.startswith(folder + os.sep):
                name = own[len(folder) + 1 :]
                listed = folder_paths.get_full_path("loras", name)
                return name if listed and os.path.realpath(listed) == own else None
        return None

    def write(self, factors: dict[str, Factors], steps: int) -> None:
        """Unless a try before has left more steps there. Raises OSError, and ValueError where numbers do not fit."""
        rank = next(iter(factors.values())).rank
        self.put(lora_tensors(self.model, factors), steps, about_network(rank))

    def put(self, tensors: dict[str, Tensor], steps: int, metadata: Mapping[str, str]) -> None:
        """As `write`, of tensors as the file is to hold them."""
        self.tensors = tensors
        if steps < self.steps:
            return
        about = {**metadata, "ss_steps": str(steps), **self.about}
        self.path = str(write_tensors(self.path, self.tensors, about))
        self.steps = steps

    def said(self) -> str:
        return f"{self.name} ({self.steps} steps)"

    def line(self, steps: int, unwritten: str | None) -> str:
        """Of a report, after so many steps. unwritten: why a file could not be written with them."""
        if self.steps >= steps:
            return f"written: {self.name}"
        line = f"{self.name} could not be written: {unwritten}; save what was learned from this node's output"
        return f"{line} (the file has {self.steps} steps)" if self.steps else line

    def beside(self, steps: int, unwritten: str | None) -> list[str]:
        """Of a file that goes with a LoRA and that no output holds: nothing where it is written. Raises OSError where
        the disk has taken none at all."""
        if not self.steps:
            raise OSError(f"{self.name} could not be written: {unwritten}; make room for it")
        if self.steps >= steps:
            return []
        return [f"{self.name} could not be written: {unwritten}; it has {self.steps} of {steps} steps"]


def put_each(puts: Iterable[Callable[[], None]]) -> OSError | None:
    """Writes several files of one run, whatever becomes of one: the last of their errors."""
    failure: OSError | None = None
    for put in puts:
        try:
            put()
        except OSError as error:
            failure = error
    return failure


def steps_done(name: str) -> int:
    """Of a file that was trained here; 0 for any other, also where its trainer counts its own."""
    with suppress(ValueError, KeyError):
        metadata = read_metadata(loras.lora_path(name))
        return int(metadata["ss_steps"]) if "ziplora_settings" in metadata else 0
    return 0


def check_fits(file: str, factors: dict[str, Factors], layers: Collection[str], settings: training.Settings) -> None:
    """Raises ValueError where a run cannot go on from a file: it has other layers or another rank."""
    try:
        trained_lora.check_fits(factors, layers, settings.rank)
    except ValueError as error:
        raise ValueError(f"'{file}' {error}") from error


def steps_before(file: str, settings: training.Settings) -> int:
    """That a file has. Raises ValueError where none are left to do."""
    done = steps_done(file)
    if done >= settings.steps:
        raise ValueError(f"'{file}' has {done} steps already; expected steps above that")
    return done
