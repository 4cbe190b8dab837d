"""Models and LoRAs that were distilled to draw in few steps, by the names that their makers give them."""

from __future__ import annotations

import re

_UNDONE = r"\b(?:de|un|non) ?distill|\bopen ?flux|\blibre ?flux"
_COUNT = r"(?<![\d.])(\d{1,2}) ?steps?\b"
_MODELS = (  # pattern, the only families whose names mean it, steps; the first that is found counts
    (r"^(?!.*\bbase\b).*\bklein", ("Flux2",), 4),
    (r"\bhidream.*\bfast\b", ("HiDream",), 16),
    (r"\bhidream.*\bdev\b", ("HiDream",), 28),
    (r"\bchroma.*\bflash", ("Chroma", "ChromaRadiance"), 8),
    (r"\b(?:ltx|hunyuan).*distilled", (), 8),
    (r"\bzit(?=\d|v\d|\b)", ("ZImage", "Lumina2"), 8),
    (r"lcm(?![a-z])", (), 8),
    (r"\bhyper ?(?:sd|sdxl|flux)\b|\bhyper\b.*\d ?steps?\b", (), 8),
    (r"lightning|\bdmd2?\b|lightx2v|step distill", (), 4),
    (r"schnell", ("Flux",), 4),
    (r"turbo", ("SD15", "SD20", "SDXL", "SD3"), 4),
    (r"turbo", (), 8),
)
_LORAS = (  # stricter: a LoRA may be of a lightning or of a car, or be made for a model that was distilled
    (r"\blcm\b", 8),
    (r"\bhyper ?(?:sd|sdxl|flux)\b", 8),
    (r"\bturbo alpha\b|\bflux ?2 turbo lora\b", 8),
    (r"\bdmd2\b|lightx2v|step distill|\blightning lora\b", 4),
)
_LORAS_WITH_COUNT = r"\b(?:lightning|turbo|hyper|tcd|pcm|flash|schnell)\b"


def _plain(said: str) -> str:
    return re.sub(r"[\W_]+", " ", said[:1000].lower()).strip()


def of_model(said: str, families: tuple[str, ...]) -> int:
    """In how many steps a model draws, by its file's name or title; 0 where that says nothing of few steps.

    families: the host's names of the model's class, the most special first.
    """
    plain = _plain(said)
    if is_undone(said):
        return 0
    for pattern, only, steps in _MODELS:
        if (not only or set(only) & set(families)) and re.search(pattern, plain):
            return _count(plain) or steps
    return 0


def is_undone(said: str) -> bool:
    """Whether a name says that a distilled model was trained back to draw in many steps."""
    return bool(re.search(_UNDONE, _plain(said)))


def of_lora(said: str) -> int:
    """In how many steps a model draws with a LoRA of this name; 0 where it says nothing of few steps."""
    plain = _plain(said)
    if re.search(_LORAS_WITH_COUNT, plain) and _count(plain):
        return _count(plain)
    return next((_count(plain) or steps for pattern, steps in _LORAS if re.search(pattern, plain)), 0)


def _count(plain: str) -> int:
    """The number of steps that a name says, 0 for none."""
    found = re.search(_COUNT, plain)
    return int(found[1]) if found else 0
