"""Base models by the names that files and sites give them: which model family, and which line within it."""

from __future__ import annotations

import re

_FAMILIES = (  # patterns of names in lower case with single spaces; the first that is found counts
    ("Flux 2", r"flux ?2"),
    ("Chroma", r"\bchroma"),
    ("Flux", r"\bflux"),
    ("Qwen-Image", r"\bqwen"),
    ("Wan", r"\bwan(?:\d|\b)"),
    ("HunyuanVideo", r"\bhunyuan ?video"),
    ("HunyuanImage", r"\bhunyuan ?image"),
    ("HunyuanDiT", r"\bhunyuan ?dit"),
    ("HiDream", r"\bhidream"),
    ("LTX-Video", r"\bltx"),
    ("Anima", r"\banima\b"),
    ("Cosmos Predict2", r"\bcosmos.*predict ?2"),
    ("Krea 2", r"\bkrea ?2"),
    ("Lumina 2 or Z-Image", r"\blumina ?2|\blumina image 2|^lumina$|\bz ?image"),
    ("SD 3", r"\bsd ?3|stable diffusion v?3"),
    ("SDXL refiner", r"xl.*refiner"),
    ("SDXL", r"\bsd ?xl|stable diffusion xl|\bpony(?! ?(?:diffusion ?)?v? ?7)|illustrious|noob ?ai|animagine"),
    ("SD 2", r"\bsd ?v?2|stable diffusion v?2"),
    ("SD 1.5", r"\bsd ?v?1|stable diffusion v?1"),
)
_LINES = (  # further trainings of SDXL with a vocabulary of their own; NoobAI was trained on from Illustrious
    ("Pony", r"pony(?! ?(?:diffusion ?)?v? ?7)"),
    ("Illustrious or NoobAI", r"illustrious|noob|\bil ?xl|\bwai\b|\bwai ?nsfw"),
    ("Animagine", r"animagine"),
)


def _plain(said: str) -> str:
    return re.sub(r"[\W_]+", " ", said[:300].lower()).strip()


def family(said: str) -> str:
    """The model family of a base model's name, as `formats.looks_like` calls it; "" where none is known.

    said: a trainer's ("sdxl_base_v1-0", "stable-diffusion-v1/lora"), a site's ("SD 1.5", "Flux.1 D", "Pony") or a
    repository's name.
    """
    return next((name for name, pattern in _FAMILIES if re.search(pattern, _plain(said))), "")


def line(said: str) -> str:
    """The line of SDXL models that a name stands for: "Pony", "Illustrious or NoobAI", "Animagine", or ""."""
    return next((name for name, pattern in _LINES if re.search(pattern, _plain(said))), "")
