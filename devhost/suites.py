"""Run the test suites one after another and print one total (standard library only)."""

from __future__ import annotations

import os
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from .chromium import ensure_chromium
from .install import DEV, ROOT, THREADS, Host

# In this order: what fails fast comes first.
SUITES = ("core", "inhost", "host", "browser")
NO_TESTS = 5  # pytest's exit status where nothing was collected


@dataclass
class Count:
    """Results of one suite."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def add(self, other: Count) -> None:
        self.passed += other.passed
        self.failed += other.failed
        self.skipped += other.skipped

    def __str__(self) -> str:
        skipped = f", {self.skipped} skipped" if self.skipped else ""
        return f"{self.passed} passed, {self.failed} failed{skipped}"


def run_suites(host: Host, arguments: list[str]) -> int:
    """Run the suites that `arguments` name (all where none is named); 0 where nothing failed."""
    suites, options = split_arguments(arguments)
    narrowed = bool(arguments)
    total = Count()
    lines = []
    for suite, paths in suites.items():
        print(f"\n== {suite} ==", flush=True)
        start = time.monotonic()
        count = run_suite(host, suite, paths, options, narrowed)
        lines.append(f"{suite + ':':9}{count} in {time.monotonic() - start:.0f} s")
        total.add(count)
    print("\n" + "\n".join(lines))
    print(total)
    return 1 if total.failed or not total.passed else 0


def split_arguments(arguments: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Sort the arguments into test paths per suite and options for pytest."""
    tests = ROOT / "tests"
    chosen: dict[str, list[str]] = {}
    options = []
    for argument in arguments:
        file, separator, name = argument.partition("::")
        path = Path(file).resolve()
        if argument.startswith("-") or not path.exists() or tests not in (path, *path.parents):
            options.append(argument)
        elif path == tests:
            chosen.update({suite: [str(tests / suite)] for suite in SUITES})
        else:
            chosen.setdefault(path.relative_to(tests).parts[0], []).append(f"{path}{separator}{name}")
    unknown = [suite for suite in chosen if suite not in SUITES]
    if unknown:
        raise SystemExit(f"error: tests/{unknown[0]} is no suite; there are {', '.join(SUITES)}.")
    return chosen or {suite: [str(tests / suite)] for suite in SUITES}, options


def run_suite(host: Host, suite: str, paths: list[str], options: list[str], narrowed: bool) -> Count:
    """Run pytest over one suite in a process of its own and count from its report."""
    report = DEV / "reports" / f"{suite}.xml"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    environment = {key: value for key, value in {**THREADS, **os.environ}.items() if key != "PYTHONPATH"}
    if suite == "browser":
        environment["CHROMIUM_PATH"] = str(ensure_chromium(host))
    # The program and not `python -m pytest`: that puts the working directory on sys.path, and the pack's folder
    # `nodes` would then hide ComfyUI's module of the same name.
    settings = [f"--junitxml={report}", "-o", f"cache_dir={DEV / 'pytest_cache'}"]
    command = [str(host.script("pytest")), *paths, *settings, *options]
    status = subprocess.run(command, cwd=ROOT, env=environment).returncode
    if status == NO_TESTS and narrowed:
        return Count()
    count = read_report(report)
    if status and not count.failed:
        print(f"error: pytest ended with status {status} and no failed test in its report", flush=True)
        count.failed = 1  # it crashed, or found no test where there must be some
    return count


def read_report(report: Path) -> Count:
    """Totals of a JUnit file; zeros where there is none."""
    if not report.is_file():
        return Count()
    count = Count()
    for suite in ElementTree.parse(report).iter("testsuite"):
        number = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
        failed = number["failures"] + number["errors"]
        count.add(Count(max(number["tests"] - failed - number["skipped"], 0), failed, number["skipped"]))
    return count
