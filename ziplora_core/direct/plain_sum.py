"""The plain sum of all updates (ZipLoRA's direct merge, arXiv 2311.13600, Eq. 1): coefficients of one."""

from __future__ import annotations

from ..coefficients import Coefficients
from .method import Method

METHOD = Method(
    "sum",
    "as two LoRA loaders in a row",
    lambda loras: (loras, Coefficients.ones(loras)),
    called="Direct merge (sum)",
)
