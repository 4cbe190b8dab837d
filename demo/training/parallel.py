"""A few single-threaded processes that average their gradients.

On a busy machine of few cores this is steadier than one process with many threads, which waits at every layer
for the slowest thread.
"""

from __future__ import annotations

import datetime
import os
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor


def _enter(rank: int, work: Callable[..., None], count: int, meeting: str, arguments: tuple[Any, ...]) -> None:
    torch.set_flush_denormal(True)  # denormal gradients cost a hundred times a normal one on a CPU
    if count > 1:
        torch.set_num_threads(1)
        # At idle priority one process may wait for hours while another is given time: that is no failure.
        patience = datetime.timedelta(days=7)
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count, timeout=patience)
    torch.manual_seed(rank)
    work(*arguments)
    if count > 1:
        dist.destroy_process_group()


def launch(work: Callable[..., None], count: int, *arguments: Any) -> None:
    """Runs `work(*arguments)` in `count` processes; in this one where count is 1."""
    with tempfile.TemporaryDirectory() as folder:
        meeting = os.path.join(folder, "meeting")
        if count == 1:
            _enter(0, work, 1, meeting, arguments)
        else:
            mp.spawn(_enter, (work, count, meeting, arguments), nprocs=count)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replaces every gradient by its mean over the processes. A parameter without gradient gets zeros."""
    if count() == 1:
        return
    params = list(parameters)
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in params]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= count()
    start = 0
    for p in params:
        p.grad = flat[start : start + p.numel()].view_as(p).clone()
        start += p.numel()


def half(device: str | torch.device) -> torch.autocast:
    """bfloat16 for what multiplies, where the machine multiplies in it: a GPU, or a processor with tiles (AMX)."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda" or torch.cpu._is_amx_tile_supported())


def agreed(here: bool) -> bool:
    """Whether the first process says so: for decisions that depend on its clock."""
    if count() == 1:
        return here
    said = torch.tensor([float(here)])
    dist.broadcast(said, 0)
    return bool(said)
