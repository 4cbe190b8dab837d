"""What a fuzzed case is judged by: which error, how long, how much memory, and what it touched outside.

One audit hook for the process (Python has no way to take one back) reports to whichever `Guard` is on duty.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

resource = pytest.importorskip("resource", reason="address space is limited by Unix")
STATUS = Path("/proc/self/statm")
if not STATUS.exists():
    pytest.skip("address space is read from Linux's /proc", allow_module_level=True)
ROOT = Path(__file__).resolve().parent.parent.parent
SECOND = 1.0
HEADROOM = 256 * 2**20  # address space that a case may take beside what the process has
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_MOVES = {"os.rename": 2, "os.mkdir": 1, "os.link": 2, "os.symlink": 2, "os.remove": 1, "os.rmdir": 1, "os.truncate": 1}
_EMPTIED = ("os.remove", "os.rmdir")
_NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.bind")
_PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork")
_UNPICKLED = ("pickle.find_class",)


class Allocations(TorchDispatchMode):
    """The largest tensor that was made, in bytes, and what could not be made."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.refused: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        try:
            out = func(*args, **(kwargs or {}))
        except RuntimeError as error:
            if "allocate memory" in str(error):
                self.refused.append(str(error))
            raise
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                self.largest = max(self.largest, leaf.untyped_storage().nbytes())
        return out


class Guard:
    """On duty between `with`: writes outside of `folders`, network, programs and unpickling are noted."""

    on_duty: Guard | None = None

    def __init__(self, *folders: Path) -> None:
        self.folders = [os.path.realpath(folder) for folder in folders]
        self.strayed: list[str] = []

    def __enter__(self) -> Guard:
        Guard.on_duty = self
        return self

    def __exit__(self, *_: object) -> None:
        Guard.on_duty = None

    def hear(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = args
            writes = bool(flags & _WRITES) if isinstance(flags, int) else bool(set(mode or "") & set("wax+"))
            if writes and not isinstance(path, int):
                self.check(event, path)
        elif event in _MOVES:
            inside = args[-1] if event in _EMPTIED and args[-1] != -1 else None  # a folder that is open, as in rmtree
            for path in args[: _MOVES[event]]:
                self.check(
                    event, path if inside is None else os.path.join(os.readlink(f"/proc/self/fd/{inside}"), path)
                )
        elif event in _NETWORK or event in _PROGRAMS or event in _UNPICKLED:
            self.strayed.append(f"{event}{args!r:.200}")

    @classmethod
    def tell(cls, what: str) -> None:
        """Of something that makes no audit event."""
        if cls.on_duty is not None:
            cls.on_duty.strayed.append(what)

    def check(self, event: str, path: Any) -> None:
        real = os.path.realpath(os.fsdecode(path))
        if not any(real == folder or real.startswith(folder + os.sep) for folder in self.folders):
            self.strayed.append(f"{event} {real}")


def _hook(event: str, args: tuple[Any, ...]) -> None:
    guard = Guard.on_duty
    if guard is not None:
        Guard.on_duty = None  # what the guard itself does is nobody's business
        try:
            guard.hear(event, args)
        finally:
            Guard.on_duty = guard


sys.addaudithook(_hook)


@contextmanager
def little_memory(headroom: int = HEADROOM):
    """No more address space than the process has, and a little: what asks for more fails at once."""
    used = int(STATUS.read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + headroom, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class Judge:
    """Counts cases by kind and by how they ended, and lets none pass that ended in another way than it may."""

    def __init__(self, folders: list[Path], errors: tuple[type[Exception], ...]) -> None:
        self.folders, self.errors = folders, errors
        self.cases: Counter[str] = Counter()
        self.works: Counter[str] = Counter()
        self.slowest: dict[str, float] = {}

    def __call__(
        self,
        kind: str,
        work: Callable[[], Any],
        names: tuple[str, ...] = (),
        room: int = 2**24,
        seconds: float = SECOND,
    ) -> Any:
        """Do some work: its result, or None where it raised an error of the pack that names one of `names`.

        room: bytes that its largest tensor may have.
        """
        self.cases[kind] += 1
        guard, allocations, error, result = Guard(*self.folders), Allocations(), None, None
        began = time.process_time()
        try:
            with guard, little_memory(), allocations:
                result = work()
        except Exception as raised:
            error = raised
        took = time.process_time() - began
        self.slowest[kind] = max(self.slowest.get(kind, 0.0), took)
        assert guard.strayed == [], guard.strayed
        assert allocations.refused == [], allocations.refused
        assert allocations.largest <= room, f"a tensor of {allocations.largest:,} bytes was made"
        assert took < seconds, f"{took:.2f} s"
        if error is None:
            self.works[kind] += 1
        else:
            self.check(error, names)
        return result

    def check(self, error: Exception, names: tuple[str, ...]) -> None:
        """An error of the pack's own, raised in the pack, with one sentence that names what was wrong."""
        trace = "".join(traceback.format_exception(error))
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        assert type(error) in self.errors, trace
        assert str(ROOT) in where and "tests" not in Path(where).relative_to(ROOT).parts, f"raised by the host\n{trace}"
        self.check_sentence(str(error), names)

    @staticmethod
    def check_sentence(text: str, names: tuple[str, ...]) -> None:
        assert text.isprintable() and len(text) < 1000, repr(text)
        assert not names or any(name in text for name in names), f"{text!r} names none of {names}"
        assert " at 0x" not in text, f"{text!r} shows an object"

    def table(self) -> str:
        lines = [f"{kind}: {n:,} cases, {self.works[kind]:,} worked, slowest {self.slowest[kind]:.2f} s of CPU"
                 for kind, n in sorted(self.cases.items())]  # fmt: skip
        return "\n".join([*lines, f"in all: {sum(self.cases.values()):,}"])
