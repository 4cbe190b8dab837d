"""LoRA files, and pairs of them, as they travel on the graph's sockets: named, read, and refused."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import folder_paths
import torch
from torch import Tensor

from ....ziplora_core import formats
from ....ziplora_core.checks import in_range
from ....ziplora_core.files import LoRAFileError, check_lora_file, check_tensors, read_lora_file, shown
from . import hashes


@dataclass(frozen=True)
class LoRASource:
    """One LoRA file as read: its name in the loras folder, tensors on the CPU, and the strength it is used at.

    version, sha256: of the file as it was read; None where the tensors come from elsewhere.
    """

    name: str
    tensors: dict[str, Tensor] = field(repr=False)  # the host keeps what an error's inputs look like
    strength: float
    version: hashes.Version | None = None
    sha256: str | None = None

    @property
    def title(self) -> str:
        """The name, fit for a line of a report, a table or an error: a file's may hold line breaks."""
        return shown(self.name, 255)


@dataclass(frozen=True, eq=False)
class LoRASources:
    """What travels on a LORA_PAIR socket: two files, not yet fitted to a model."""

    content: LoRASource
    style: LoRASource
    warnings: tuple[str, ...] = ()

    def by_concept(self) -> dict[str, LoRASource]:
        return {"content": self.content, "style": self.style}


def lora_path(name: str) -> str:
    """Full path of a file in the host's loras folders. Raises LoRAFileError where there is none."""
    path = folder_paths.get_full_path("loras", name) if isinstance(name, str) else None  # the API may say anything
    if path is None:
        raise LoRAFileError(f"'{shown(str(name))}' is missing; put it into the loras folder or choose another file")
    return path


def fingerprint(name: str) -> hashes.Version:
    """Changes when the file does, and not where it only has new rights, a link or its old name again. Raises
    LoRAFileError where there is none."""
    return hashes.HASHES.version(lora_path(name))


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
    _check_strengths(content_strength, style_strength)
    refuse_one_file(content, style)
    sources = LoRASources(load(content, content_strength), load(style, style_strength))
    if _hold_the_same(sources):
        raise _same_file(content, style)
    return sources


def refuse_one_file(content: str, style: str) -> None:
    """Raises LoRAFileError where both names lead to one file, or one to none. Reads nothing."""
    if hashes.is_one_file(lora_path(content), lora_path(style)):
        raise _same_file(content, style)


def _same_file(content: str, style: str) -> LoRAFileError:
    one, other = shown(content, 255), shown(style, 255)
    which = f"'{one}' is" if content == style else f"'{one}' and '{other}' hold the same LoRA, which would be"
    return LoRAFileError(
        f"{which} both the content and the style LoRA, so there is nothing to zip; choose the subject's file in "
        "content_lora and the style's in style_lora"
    )


def _hold_the_same(sources: LoRASources) -> bool:
    one, other = sources.content.tensors, sources.style.tensors
    return one.keys() == other.keys() and all(_same(tensor, other[key]) for key, tensor in one.items())


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.element_size() == 1:  # torch compares no float8 with itself
        one, other = one.view(torch.uint8), other.view(torch.uint8)
    return torch.equal(one, other.to(one.device))


def pair(content: dict, style: dict, content_strength: float, style_strength: float) -> LoRASources:
    """Two LORA_MODELs of other nodes; one for both, of which each may be given other blocks. Raises LoRAFileError for
    what is no LoRA, ValueError for a strength."""
    made = []
    _check_strengths(content_strength, style_strength)
    for concept, tensors, strength in (("content", content, content_strength), ("style", style, style_strength)):
        name = f"{concept}_lora"
        if not isinstance(tensors, dict) or not tensors or not all(isinstance(t, Tensor) for t in tensors.values()):
            raise LoRAFileError(f"{name} holds no LoRA; connect Train Concept LoRA, or a node like it")
        check_tensors(name, tensors)
        made.append(LoRASource(name, dict(tensors), strength))
    return LoRASources(made[0], made[1])


def refuse_one_lora(sources: LoRASources) -> None:
    """Raises LoRAFileError where both hold the same: there is nothing to zip."""
    if _hold_the_same(sources):
        raise LoRAFileError(
            "content_lora and style_lora hold the same LoRA, so there is nothing to zip; connect the subject's LoRA to "
            "content_lora and the style's to style_lora"
        )


def _check_strengths(content: float, style: float) -> None:
    in_range("content_strength", content, -100, 100)
    in_range("style_strength", style, -100, 100)


def load(name: str, strength: float) -> LoRASource:
    """Read one file, and its hash in the same pass where it is not known. Raises LoRAFileError."""
    path = lora_path(name)
    file, version = hashes.key(path), fingerprint(name)
    known = hashes.HASHES.known(file)
    digest = hashlib.sha256() if known is None else None
    tensors = read_lora_file(path, digest)
    if hashes.key(path) != file:
        raise LoRAFileError(f"'{shown(name, 255)}' has changed while it was read; queue again")
    if digest is not None:
        known = digest.hexdigest()
        hashes.HASHES.remember(file, known)
    return LoRASource(name, tensors, strength, version, known)
