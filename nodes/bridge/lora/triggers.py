"""What LoRA files in the host's loras folders, and the files beside them, say of their use."""

from __future__ import annotations

from ....ziplora_core.triggers import Triggers

__all__ = ["Triggers", "of_file"]


def of_file(name: str) -> Triggers:
    """What a file in the host's loras folders says of its use, from its header and the files beside it alone.

    Never raises: nothing is known of what is not there or cannot be read, and notes say why.
    """
    return Triggers()
