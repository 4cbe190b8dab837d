"""LoRA files, and sets of them, as they travel on the graph's sockets: named, read, and refused."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import NamedTuple

import folder_paths
import torch
from torch import Tensor

from ....ziplora_core import formats
from ....ziplora_core.checks import Range
from ....ziplora_core.files import LoRAFileError, check_lora_file, check_tensors, read_lora_file, shown
from ....ziplora_core.lora_set import CONCEPTS, is_pair
from . import adapter_config, hashes, reads


class SameLoRAError(LoRAFileError):
    """Two of the files hold one LoRA."""


class FileVersion(NamedTuple):
    """`hashes.Version` of a LoRA file, and of the configuration that peft keeps beside it; None where none counts."""

    path: str
    size: int
    modified: int
    changed: int
    config: hashes.Version | None = None


STRENGTH = Range(-100, 100)  # of a LoRA, a merge or a dial: wider than the nodes' sliders, for the API


@dataclass(frozen=True)
class LoRASource:
    """One LoRA file as read: its name in the loras folder, tensors on the CPU, and the strength it is used at.

    version, sha256: of the file as it was read; None where the tensors come from elsewhere. clip_strength: of its
    text-encoder part; None where it is the same. notes: on what was read of it. config: a short digest of the scales
    that its header or a file beside it gives its layers; "" where none does. unfused: the file as it is by itself,
    where `tensors` go with those of other LoRAs alone.
    """

    name: str
    tensors: dict[str, Tensor] = field(repr=False)  # the host keeps what an error's inputs look like
    strength: float
    version: FileVersion | None = None
    sha256: str | None = None
    clip_strength: float | None = None
    notes: tuple[str, ...] = ()
    config: str = ""
    unfused: LoRASource | None = field(default=None, repr=False)

    @property
    def of_clip(self) -> float:
        """Strength of its text-encoder part."""
        return self.strength if self.clip_strength is None else self.clip_strength

    def times(self, dial: float) -> LoRASource:
        """The same file at another multiple of its strengths."""
        apart, unfused = self.clip_strength, self.unfused and self.unfused.times(dial)
        clip_strength = None if apart is None else dial * apart
        return replace(self, strength=dial * self.strength, clip_strength=clip_strength, unfused=unfused)

    @property
    def title(self) -> str:
        """The name, fit for a line of a report, a table or an error: a file's may hold line breaks."""
        return shown(self.name, 255)


@dataclass(frozen=True, eq=False)
class LoRASources:
    """What travels on a LORA_PAIR socket: files by concept, "content" and "style" where they are a pair, not yet
    fitted to a model. Their order is that of everything built from them.

    inputs: (concept, "positive" or "latents") -> how the node that asks for it calls it, where that is not ZipLoRA
    Optimize. own_text_encoders: that node encodes each prompt with its LoRA's own text-encoder part.
    """

    by_concept: Mapping[str, LoRASource]
    warnings: tuple[str, ...] = ()
    inputs: Mapping[tuple[str, str], str] = field(default_factory=dict)
    own_text_encoders: bool = False

    def __getitem__(self, concept: str) -> LoRASource:
        return self.by_concept[concept]

    def dialled(self, strengths: Mapping[str, float]) -> LoRASources:
        """A copy with the LoRAs' strengths multiplied by these, by concept; as `ZippedLoRA.dialled`."""
        return replace(self, by_concept={c: of.times(strengths.get(c, 1.0)) for c, of in self.by_concept.items()})

    def input_name(self, concept: str, what: str) -> str:
        """How a node calls what a concept is given; the inputs of ZipLoRA Optimize are for the first two."""
        if (concept, what) in self.inputs:
            return self.inputs[concept, what]
        place = list(self.by_concept).index(concept)
        return f"{CONCEPTS[place]}_{what}" if place < len(CONCEPTS) else f"{what} of {concept} (in references)"

    def names(self) -> str:
        """Their titles, for errors."""
        return " + ".join(f"'{source.title}'" for source in self.by_concept.values())


def role(concept: str) -> str:
    """A concept as a stranger to the paper calls it."""
    return re.sub(r"^content\b", "subject", concept)


def of_kind(kind: str, concepts: Iterable[str]) -> list[str]:
    """The concepts that are of one kind, "content" or "style": the first, and those with a number."""
    return [concept for concept in concepts if re.fullmatch(rf"{kind}( \d+)?", concept)]


def lora_path(name: str) -> str:
    """Full path of a file in the host's loras folders. Raises LoRAFileError where there is none."""
    path = folder_paths.get_full_path("loras", name) if isinstance(name, str) else None  # the API may say anything
    if path is None:
        raise LoRAFileError(f"'{shown(str(name))}' is missing; put it into the loras folder or choose another file")
    return path


def fingerprint(name: str) -> FileVersion:
    """Changes when the file does, or which configuration counts beside it, and not where the file only has new rights,
    a link or its old name again. Raises LoRAFileError where there is none."""
    path = lora_path(name)
    version, beside = hashes.HASHES.version(path), adapter_config.place(path)
    config = None
    with suppress(LoRAFileError):  # it may go meanwhile
        config = None if beside is None else hashes.version(beside)
    return FileVersion(*version, config)


def check(name: str) -> str | None:
    """One sentence on why this file cannot be used, or None. Reads its header alone: the server waits meanwhile."""
    try:
        alone = formats.is_text_encoder_alone(check_lora_file(lora_path(name)))
    except LoRAFileError as error:
        return str(error)
    return str(text_encoder_alone(shown(name, 255))) if alone else None


def text_encoder_alone(title: str) -> LoRAFileError:
    return LoRAFileError(
        f"'{title}' changes the text encoder alone, so there is nothing to zip; choose a LoRA that changes the model "
        "here, and use ComfyUI's Load LoRA for this one"
    )


def load_pair(content: str, style: str, content_strength: float, style_strength: float) -> LoRASources:
    """Read both files. Raises LoRAFileError, also where both hold the same, and ValueError for a strength."""
    files = {"content": (content, content_strength), "style": (style, style_strength)}
    return load_sources(files, of_inputs=True)


def load_sources(
    files: Mapping[str, tuple[str, float] | tuple[str, float, float | None]], of_inputs: bool = False
) -> LoRASources:
    """Read all files. files: concept -> (name, strength), and the text encoder's strength where it is another.
    of_inputs: whether they were chosen in content_lora and style_lora, which errors then name.

    Raises LoRAFileError, also where two hold the same, and ValueError for a strength.
    """
    _check_strengths({concept: strength for concept, (_, strength, *_) in files.items()})
    refuse_one_file(*(name for name, *_ in files.values()), of_inputs=of_inputs)
    sources = LoRASources({concept: load(*file) for concept, file in files.items()})
    same = _hold_the_same(sources)
    if same is not None:
        one, other = (files[concept][0] for concept in same)
        raise _same_file(one, other, of_inputs)
    return sources


def refuse_one_file(*names: str, of_inputs: bool = True) -> None:
    """Raises LoRAFileError where two names lead to one file, or one to none. Reads nothing. of_inputs: as of
    `load_sources`."""
    paths = [lora_path(name) for name in names]
    for (one, path), (other, other_path) in combinations(zip(names, paths, strict=True), 2):
        if hashes.is_one_file(path, other_path):
            raise _same_file(one, other, of_inputs)


def _same_file(one: str, other: str, of_inputs: bool = True) -> SameLoRAError:
    first, second = shown(one, 255), shown(other, 255)
    if not of_inputs:
        return SameLoRAError(f"'{first}' and '{second}' hold the same LoRA; take one of them out")
    which = f"'{first}' is" if one == other else f"'{first}' and '{second}' hold the same LoRA, which would be"
    return SameLoRAError(
        f"{which} both the content and the style LoRA, so there is nothing to zip; choose the subject's file in "
        "content_lora and the style's in style_lora"
    )


def _hold_the_same(sources: LoRASources) -> tuple[str, str] | None:
    """The first two concepts whose LoRAs are one."""
    for (one, a), (other, b) in combinations(sources.by_concept.items(), 2):
        if one_lora(a, b):
            return one, other
    return None


def one_lora(one: LoRASource, other: LoRASource) -> bool:
    """Whether two hold the same tensors, at whatever strengths, before a fusion where there was one."""
    mine, theirs = ((of.unfused or of).tensors for of in (one, other))
    return mine.keys() == theirs.keys() and all(same_bits(t, theirs[key]) for key, t in mine.items())


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one to the last bit, on whatever device."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.element_size() == 1:  # torch compares no float8 with itself
        one, other = one.view(torch.uint8), other.view(torch.uint8)
    return torch.equal(one, other.to(one.device))


def pair(content: dict, style: dict, content_strength: float, style_strength: float) -> LoRASources:
    """Two LORA_MODELs of other nodes; one for both, of which each may be given other blocks. Raises LoRAFileError for
    what is no LoRA, ValueError for a strength."""
    by_concept = {}
    _check_strengths({"content": content_strength, "style": style_strength})
    for concept, tensors, strength in (("content", content, content_strength), ("style", style, style_strength)):
        name = f"{concept}_lora"
        if not isinstance(tensors, dict) or not tensors or not all(isinstance(t, Tensor) for t in tensors.values()):
            raise LoRAFileError(f"{name} holds no LoRA; connect Train Concept LoRA, or a node like it")
        check_tensors(name, tensors)
        by_concept[concept] = LoRASource(name, dict(tensors), strength)
    return LoRASources(by_concept)


def refuse_one_lora(sources: LoRASources) -> None:
    """Raises LoRAFileError where two hold the same: there is nothing to zip."""
    same = _hold_the_same(sources)
    if same is not None and not is_pair(sources.by_concept):
        raise SameLoRAError(f"{' and '.join(same)} hold the same LoRA; take one of them out")
    if same is not None:
        raise SameLoRAError(
            "content_lora and style_lora hold the same LoRA, so there is nothing to zip; connect the subject's LoRA to "
            "content_lora and the style's to style_lora"
        )


def _check_strengths(by_concept: Mapping[str, float]) -> None:
    for concept, strength in by_concept.items():
        STRENGTH.check(f"{concept}_strength", strength)


def _check_same(name: str, path: str, file: hashes.Key) -> None:
    if hashes.key(path) != file:
        raise LoRAFileError(f"'{shown(name, 255)}' has changed while it was read; queue again")


def load(name: str, strength: float, clip_strength: float | None = None) -> LoRASource:
    """Read one file, and its hash in the same pass where it is not known. Raises LoRAFileError."""
    path = lora_path(name)
    reads.remember(fingerprint, name)
    file, version = hashes.key(path), fingerprint(name)
    known = hashes.HASHES.known(file)
    digest = hashlib.sha256() if known is None else None
    tensors = read_lora_file(path, digest)
    _check_same(name, path, file)  # before the header is read once more, which may be another's by now
    tensors, notes, config = adapter_config.completed(path, shown(name, 255), tensors)
    _check_same(name, path, file)
    if digest is not None:
        known = digest.hexdigest()
        hashes.HASHES.remember(file, known)
    apart = None if clip_strength == strength else clip_strength
    return LoRASource(name, tensors, strength, version, known, apart, notes, config)
