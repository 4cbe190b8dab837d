"""The host's text encoders, run for the gradient of one word's vectors, and of a branch on their layers."""

from __future__ import annotations

import contextlib
import copy
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ....ziplora_core.files import shown
from ....ziplora_core.training import Adapted
from .foreign import CopyBeforeChange, OrdinaryTensors
from .injection import frozen_layers

_NAME = "ziplora_word"
_SAMPLED = 2048  # words of a table, to tell how its numbers are spread
Rows = Mapping[str, Tensor]  # text encoder, as embedding files name it -> (vectors, width)


def replace_word(text: str, word: str, by: str) -> str:
    """A prompt with something else wherever the whole word stands."""
    return re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", lambda _: by, text)


@dataclass(frozen=True)
class _Place:
    """Where a prompt's tokens have a vector of the word."""

    key: str
    row: int


class WordEncoder:
    """A CLIP that encodes prompts with a word whose vectors are given, differentiable in these.

    Tokens are the host's own, as of a prompt that names an embedding file. clip: not changed; while `injected`, its
    text encoders' linear layers run frozen. Raises ValueError where no text encoder of it takes embeddings, or where
    hooks are on it.
    """

    def __init__(self, clip: Any):
        if getattr(clip.patcher, "forced_hooks", None) is not None:
            raise ValueError("clip carries hooks; connect the checkpoint's own text encoder without them")
        self._encoders: dict[str, tuple[str, Any]] = {}
        for name, tokenizer in vars(clip.tokenizer).items():
            takes = getattr(tokenizer, "embedding_directory", None) is not None
            model, short = clip.cond_stage_model, name.removeprefix("clip_")  # hosts call T5's tokenizer clip_t5xxl
            encoder = getattr(model, name, None) or getattr(model, short, None)
            if takes and hasattr(encoder, "transformer"):
                self._encoders[tokenizer.embedding_key] = (name, encoder)
        if not self._encoders:
            raise ValueError(
                f"no text encoder of this clip ({type(clip.cond_stage_model).__name__}) takes embeddings; connect that "
                "of a model whose prompts do, such as SDXL"
            )
        self._clip = clip
        self._loaded = copy.copy(clip)  # encodes on what is loaded already
        self._loaded.load_model = lambda *_, **__: clip.patcher

    @property
    def keys(self) -> list[str]:
        """Of its text encoders, as embedding files name them."""
        return list(self._encoders)

    @property
    def patcher(self) -> Any:
        return self._clip.patcher

    @torch.no_grad()
    def start(self, text: str, vectors: int, called: str = "initial_word") -> dict[str, Tensor]:
        """The vectors of some words, or of an `embedding:name`: the first so many, again from the first where there are
        fewer. called: the input that says them. Raises ValueError where the text is no word, and for an embedding of
        another model, which the host's encoders would leave out of a prompt."""
        self._clip.load_model()
        found = {}
        for key, (name, encoder) in self._encoders.items():
            tokenizer = getattr(self._clip.tokenizer, name)
            batches = tokenizer.tokenize_with_weights(text, return_word_ids=True)
            tokens = [token for batch in batches for token, _, word in batch if word]
            if not tokens:
                raise ValueError(
                    f"{called} '{shown(text)}' is no word: the text encoder finds nothing in it; write another"
                )
            table = encoder.transformer.get_input_embeddings()
            rows = [self._row(table, token) for token in tokens]
            odd = next((row for row in rows if len(row) != table.weight.shape[1]), None)
            if odd is not None:
                raise ValueError(
                    f"{called} '{shown(text)}' has vectors of {len(odd)} numbers where this model's {key} takes "
                    f"{table.weight.shape[1]}: it is an embedding of another model; name one of this model, or a word"
                )
            found[key] = torch.stack([rows[i % len(rows)] for i in range(vectors)])
        return found

    @torch.no_grad()
    def random(self, vectors: int, seed: int) -> dict[str, Tensor]:
        """Normal numbers around 0, spread as those of the words that each text encoder has."""
        self._clip.load_model()
        generator, found = torch.Generator().manual_seed(seed % 2**63), {}
        for key, (_, encoder) in self._encoders.items():
            table = encoder.transformer.get_input_embeddings()
            count, device = table.weight.shape[0], table.weight.device
            some = torch.arange(0, count, max(1, count // _SAMPLED), device=device)
            rows = table(some[None], out_dtype=torch.float32)[0].cpu()
            found[key] = float(rows.std()) * torch.randn(vectors, rows.shape[1], generator=generator)
        return found

    @staticmethod
    def _row(table: Any, token: Any) -> Tensor:
        if isinstance(token, Tensor):
            return token.float().cpu()
        row: Tensor = table(torch.tensor([[token]], device=table.weight.device), out_dtype=torch.float32)
        return row[0, 0].cpu()

    def tokens(self, text: str, word: str, vectors: int) -> dict[str, Any]:
        """A prompt's tokens, with places for the vectors of `word`. Raises ValueError where the prompt lacks it."""
        named = replace_word(text, word, f" embedding:{_NAME} ")
        if named == text:
            raise ValueError(
                f"the prompt '{shown(text)}' lacks the word '{shown(word)}'; write it where the concept stands"
            )
        spoken = copy.copy(self._clip)
        spoken.tokenizer = copy.copy(self._clip.tokenizer)
        with tempfile.TemporaryDirectory() as folder:
            marked = {}
            for number, (key, (name, _)) in enumerate(self._encoders.items()):
                tokenizer = copy.copy(getattr(self._clip.tokenizer, name))
                marks = torch.zeros(int(vectors), tokenizer.embedding_size)
                marks[:, 0], marks[:, 1] = number, torch.arange(vectors)
                known = tokenizer.embedding_directory
                tokenizer.embedding_directory = [folder, *([known] if isinstance(known, str) else known)]
                marked[key] = marks
                setattr(spoken.tokenizer, name, tokenizer)
            save_file(marked, Path(folder) / f"{_NAME}.safetensors")
            tokens = spoken.tokenize(named)
        return {kind: [[self._placed(t) for t in batch] for batch in batches] for kind, batches in tokens.items()}

    def _placed(self, token: tuple) -> tuple:
        mark = token[0]
        if not (isinstance(mark, Tensor) and bool((mark[2:] == 0).all())):
            return token
        return (_Place(self.keys[int(mark[0])], int(mark[1])), *token[1:])

    @contextlib.contextmanager
    def injected(self, layers: Collection[str] = (), branch: Adapted | None = None) -> Iterator[None]:
        """layers: of the text encoders (`clip_l.….weight`), to which the branch is added meanwhile."""
        with frozen_layers(self._clip.cond_stage_model, layers, branch):
            yield

    def encode(self, tokens: dict[str, Any], rows: Rows, load: bool = False) -> list:
        """A conditioning as CLIP Text Encode makes it. load: the text encoders first, where they may lie elsewhere."""

        def filled(token: tuple) -> tuple:
            at = token[0]
            return (rows[at.key][at.row], *token[1:]) if isinstance(at, _Place) else token

        given = {kind: [[filled(t) for t in batch] for batch in batches] for kind, batches in tokens.items()}
        if load:
            self._clip.load_model()
        with contextlib.ExitStack() as stack:
            if torch.is_grad_enabled():
                copies = CopyBeforeChange()
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(copies.keep, copies.kept))
                stack.enter_context(copies)
                stack.enter_context(OrdinaryTensors())
            conditioning: list = self._loaded.encode_from_tokens_scheduled(given)
        return conditioning
