"""Do the tests notice? Deliberate faults, one at a time, each against the tests that should see it (standard library).

    python3 dev.py mutants                     every fault
    python3 dev.py mutants --only core         those of one list: core (ziplora_core) or bridge (nodes/bridge)
    python3 dev.py mutants -k solver --jobs 2  those with this text in name or file, two at a time
    python3 dev.py mutants --list              name them and run nothing

The faults stand in devhost/mutations/. They are put into copies of the checkout in a temporary folder, never into the
checkout itself. Exits with 1 where a fault no longer fits its file, where tests fail without one, or where fewer than
95 % of the faults are caught.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from .host import DEV, ROOT, THREADS, Host
from .install import set_up
from .mutations import Mutant, bridge, core

LISTS = {"core": core.MUTANTS, "bridge": bridge.MUTANTS}
ENOUGH = 0.95  # share caught of those that are not harmless
SLOWER = 5  # times as long as without the fault, and it counts as hanging
LEAST = 120.0  # seconds, whatever the tests take without it
PASSED, FAILED = 0, 1  # pytest's exit status
INTERRUPTED = 2  # a file could not be collected: it imports what the fault broke


@dataclass(frozen=True)
class Outcome:
    """kind: caught, timed out, survived, stale or broken. detail: one line. seconds: of its tests."""

    mutant: Mutant
    kind: str
    detail: str = ""
    seconds: float = 0.0


@dataclass
class Row:
    """Of the table: counts by kind for one file."""

    counts: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1

    def of(self, *kinds: str) -> int:
        return sum(self.counts.get(kind, 0) for kind in kinds)


def run_mutants(arguments: list[str]) -> int:
    """The command: 0 where every fault fits and enough are caught."""
    parser = argparse.ArgumentParser(
        "dev.py mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=LISTS, help="one list")
    parser.add_argument("-k", metavar="TEXT", default="", help="those with this text in name or file")
    parser.add_argument("--list", action="store_true", help="name them and run nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="so many at a time")
    given = parser.parse_args(arguments)
    lists = [given.only] if given.only else list(LISTS)
    mutants = [m for name in lists for m in LISTS[name] if given.k in m.name or given.k in m.file]
    names = [mutant.name for mutant in mutants]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        print(f"error: two faults have the name '{twice[0]}': give each its own", file=sys.stderr)
        return 1
    if not mutants:
        print("error: no fault has such a name or file", file=sys.stderr)
        return 1
    outcomes = [outcome for mutant in mutants for outcome in unfit(mutant)]
    apart = {outcome.mutant.name for outcome in outcomes}
    wanted = [mutant for mutant in mutants if mutant.name not in apart]
    if given.list:
        for mutant in mutants:
            print(f"{mutant.file}: {mutant.name}" + (f" (harmless: {mutant.harmless})" if mutant.harmless else ""))
    else:
        try:
            outcomes += run_all(set_up(), wanted, max(1, given.jobs))
        except TestsFail as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return show(outcomes, run=not given.list)


class TestsFail(RuntimeError):
    """Tests that a fault should break fail without it."""


def unfit(mutant: Mutant) -> Iterator[Outcome]:
    """Why a fault is not run, if it is not."""
    path = ROOT / mutant.file
    text = path.read_text(encoding="utf-8") if path.is_file() else None
    missing = [test for test in mutant.tests if not (ROOT / test.partition("::")[0]).exists()]
    if text is None or text.count(mutant.old) != 1:
        found = "no such file" if text is None else f"its text stands there {text.count(mutant.old)} times"
        yield Outcome(mutant, "stale", f"{found}; write it again for the code as it is")
    elif missing or not mutant.tests:
        yield Outcome(mutant, "stale", f"names no test that is there: {', '.join(missing) or 'none'}")
    elif mutant.old == mutant.new:
        yield Outcome(mutant, "broken", "changes nothing")
    else:
        try:
            if path.suffix == ".py":
                compile(text.replace(mutant.old, mutant.new), mutant.file, "exec")
        except SyntaxError as error:
            yield Outcome(mutant, "broken", f"is no Python: {error.msg}, line {error.lineno}")
            return
        if mutant.harmless:
            yield Outcome(mutant, "harmless", mutant.harmless)


def run_all(host: Host, mutants: Sequence[Mutant], jobs: int) -> list[Outcome]:
    """Each in a copy of the checkout, `jobs` of them at a time. Raises TestsFail."""
    with tempfile.TemporaryDirectory(prefix="ziplora-mutants-") as folder:
        copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(min(jobs, max(len(mutants), 1))):
            copies.put(copy_checkout(Path(folder) / str(number)))
        with Pool(host, copies, jobs) as pool:
            needed = dict.fromkeys(group for mutant in mutants for group in by_suite(mutant.tests))
            seconds = dict(zip(needed, pool.map(pool.seconds_without, needed), strict=True))
            return list(pool.map(lambda mutant: pool.outcome(mutant, seconds), mutants))


class Pool:
    """Workers, each with a copy of the checkout for as long as it runs something; ends what runs when it is left."""

    def __init__(self, host: Host, copies: queue.SimpleQueue[Path], jobs: int):
        self._host, self._copies, self._alone = host, copies, jobs == 1
        self._executor = ThreadPoolExecutor(copies.qsize())
        self._running: set[subprocess.Popen[str]] = set()
        self.map = self._executor.map

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)
        for process in list(self._running):
            end(process)
        self._executor.shutdown(wait=True)

    @contextlib.contextmanager
    def _copy(self) -> Iterator[Path]:
        copy = self._copies.get()
        try:
            yield copy
        finally:
            self._copies.put(copy)

    def seconds_without(self, tests: tuple[str, ...]) -> float:
        """How long tests take without a fault. Raises TestsFail where they do not pass."""
        start = time.monotonic()
        with self._copy() as copy:
            status, said = self._pytest(copy, tests, None)
        if status != PASSED:
            raise TestsFail(f"{' '.join(tests)}: fails without a fault (status {status})\n{said}")
        return time.monotonic() - start

    def outcome(self, mutant: Mutant, seconds: dict[tuple[str, ...], float]) -> Outcome:
        start = time.monotonic()
        with self._copy() as copy, fault(copy, mutant):
            kind, detail = "survived", ""
            for tests in by_suite(mutant.tests):
                status, said = self._pytest(copy, tests, max(LEAST, SLOWER * seconds[tests]))
                if status != PASSED:
                    kind = {FAILED: "caught", INTERRUPTED: "caught", None: "timed out"}.get(status, "broken")
                    detail = first_failure(said) if kind == "caught" else f"pytest's status is {status}"
                    break
        outcome = Outcome(mutant, kind, detail, time.monotonic() - start)
        print(f"{kind:9} {outcome.seconds:4.0f} s  {mutant.name}", flush=True)
        return outcome

    def _pytest(self, copy: Path, tests: Sequence[str], limit: float | None) -> tuple[int | None, str]:
        """pytest's exit status (None where it took longer than `limit` seconds) and its words."""
        threads = {} if self._alone else {"OMP_NUM_THREADS": "1"}  # several at a time share the cores
        environment = {**THREADS, **threads, **os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        environment.pop("PYTHONPATH", None)
        # The program and not `python -m pytest`, as in suites.py.
        command = [str(self._host.script("pytest")), "-x", "-q", "-p", "no:cacheprovider", *tests]
        process = subprocess.Popen(
            command,
            cwd=copy,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._running.add(process)
        try:
            said, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            end(process)
            process.communicate()
            return None, ""
        finally:
            self._running.discard(process)
        return process.returncode, said


def end(process: subprocess.Popen[str]) -> None:
    """A process and those that it started: it leads a session of its own."""
    if os.name == "nt":
        process.kill()
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def by_suite(tests: Sequence[str]) -> list[tuple[str, ...]]:
    """Paths that one pytest may run: suites have settings of their own."""
    suites: dict[str, list[str]] = {}
    for test in tests:
        suites.setdefault("/".join(test.split("/")[:2]), []).append(test)
    return [tuple(paths) for paths in suites.values()]


def copy_checkout(target: Path) -> Path:
    """What git tracks or would track, as it is now, and a way to the development host's ComfyUI."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        source = ROOT / name
        if source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target / name)
    # Not the whole of .dev: a virtual environment that seems to have moved would be made again.
    (target / ".dev").mkdir(parents=True, exist_ok=True)
    if (DEV / "comfyui").is_dir():
        (target / ".dev" / "comfyui").symlink_to(DEV / "comfyui", target_is_directory=True)
    return target


@contextlib.contextmanager
def fault(copy: Path, mutant: Mutant) -> Iterator[None]:
    """The fault in a copy of the checkout, for the length of the block."""
    path = copy / mutant.file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(text, encoding="utf-8")


def first_failure(said: str) -> str:
    """The line of pytest's summary that names the first failure."""
    lines = [line for line in said.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return lines[0].split(" - ")[0] if lines else ""


def show(outcomes: Sequence[Outcome], run: bool) -> int:
    """Print table, lists and share; returns the command's exit status."""
    kinds = ("survived", "stale", "broken", "timed out", "harmless")
    for kind in kinds:
        for outcome in outcomes:
            if outcome.kind == kind:
                print(f"{kind}: {outcome.mutant.file}: {outcome.mutant.name}" + f": {outcome.detail}".rstrip(": "))
    spoiled = [outcome for outcome in outcomes if outcome.kind in ("stale", "broken")]
    if not run:
        return 1 if spoiled else 0
    rows: dict[str, Row] = {}
    for outcome in outcomes:
        for name in (outcome.mutant.file, "all"):
            rows.setdefault(name, Row()).add(outcome.kind)
    total = rows.pop("all")
    rows = {**dict(sorted(rows.items())), "all": total}
    width = max(map(len, rows))
    print(f"\n{'file':{width}}  tried  caught  timed out  survived  stale  harmless")
    for name, row in rows.items():
        tried, caught = row.of("caught", "timed out", "survived"), row.of("caught")
        late, left, old, same = row.of("timed out"), row.of("survived"), row.of("stale", "broken"), row.of("harmless")
        print(f"{name:{width}}  {tried:5}  {caught:6}  {late:9}  {left:8}  {old:5}  {same:8}")
    tried, caught = total.of("caught", "timed out", "survived"), total.of("caught", "timed out")
    share = caught / tried if tried else 1.0
    print(f"\n{caught} of {tried} caught, {share:.1%}")
    return 1 if spoiled or share < ENOUGH else 0
