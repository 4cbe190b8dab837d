"""Where memory runs out: what says so, and one more try with the least."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import comfy.model_management as management

from .plan import GB, Plan

T = TypeVar("T")

LESS = (
    "connect smaller latents (drawn_size where none are connected), lower batch_size, or choose solver 'layerwise', "
    "which needs no backward pass"
)


def carry_out(plan: Plan, attempt: Callable[[Plan], T], what: str = "zip", less: str = LESS) -> tuple[Plan, T]:
    """Run it; where memory runs out, once more with the least. Returns the plan that worked, and what it gave.

    what, less: for the message when that is not enough either: what was tried, and what would need less. Raises
    what `attempt` raised; out of memory for good, the same kind of exception with what to change.
    """
    for planned in (plan, plan.least()):
        if planned is None:
            break
        if planned is not plan:
            logging.warning("ZipLoRA: out of memory; once more with the least.")
            management.soft_empty_cache()
        logging.info("ZipLoRA: %s.", planned.line())
        try:
            return planned, attempt(planned)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            kind = type(error)  # and not the error, whose frames hold what filled the memory
    raise kind(
        f"not enough memory to {what}: about {plan.need / GB:.1f} GB are needed beside the model, "
        f"{plan.room / GB:.1f} GB were there; {less}"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """The host's own exception for it, or a device's that has none of its own. Newer hosts know more of them."""
    known = getattr(management, "is_oom", None)
    if known is not None and known(error):
        return True
    if management.OOM_EXCEPTION is not Exception and isinstance(error, management.OOM_EXCEPTION):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ("out of memory", "can't allocate"))
