"""ED-LoRA, what Mix-of-Show trains of one concept (arXiv 2305.18292, Sec. 3.2): LoRAs and a word.

A LoRA of the network, one of the text encoders, and the two vectors of the concept's word, V_rand and V_class. The
paper has another two for each layer that reads the prompt (P+); here all layers read the same two, since they have one
prompt on the host. Left out of the authors' code: masks and attention maps in the loss, the offset of the noise,
weight decay, and a rate that sinks to zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from . import training
from .checks import Range
from .trained_embedding import TrainedEmbedding
from .trained_lora import TrainedLoRA
from .training import Adapted, Rows

VECTORS = 2  # of the word


@dataclass(frozen=True)
class Settings(training.Settings):
    """Rank and rates are the paper's (Sec. 4.1), steps and batch those of an example of its authors' code.

    learning_rate: of the network's LoRA. text_encoder_rate, word_rate: of the text encoders' LoRA, and of the vectors.
    """

    steps: int = 1000
    learning_rate: float = 1e-4
    rank: int = 4
    batch_size: int = 4
    text_encoder_rate: float = 1e-5
    word_rate: float = 1e-3

    ranges: ClassVar[Mapping[str, Range]] = {
        **training.Settings.ranges,
        "text_encoder_rate": training.Settings.ranges["learning_rate"],
        "word_rate": training.Settings.ranges["learning_rate"],
    }


class TrainedEDLoRA(training.Plain):
    """unet, text, word: its three parts, of which each has Adam's rate for itself."""

    def __init__(self, unet: TrainedLoRA, text: TrainedLoRA, word: TrainedEmbedding, settings: Settings):
        self.unet, self.text, self.word = unet, text, word
        self._settings = settings

    def tensors(self) -> list[Tensor]:
        return [*self.unet.tensors(), *self.text.tensors(), *self.word.tensors()]

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        return [
            *self.unet.groups(learning_rate),
            *self.text.groups(self._settings.text_encoder_rate),
            *self.word.groups(self._settings.word_rate),
        ]

    def branch(self, rows: Rows | None = None) -> Adapted:
        """Of the network; the text encoders take `text.branch()`."""
        return self.unet.branch(rows)

    def largest(self) -> str | None:
        sizes = {**self.unet.sizes(), **self.text.sizes()}
        return max(sizes, key=sizes.__getitem__) if any(sizes.values()) else None
