"""Run the test suites one after another, each over the machine's cores, and print one total (standard library only).

A whole suite is shared out among workers of pytest-xdist, each with servers and a browser of its own; a few files or
tests run in one process, as pytest alone would run them.
"""

from __future__ import annotations

import os
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

from . import covered
from .chromium import ensure_chromium
from .host import DEV, ROOT, THREADS, Host

# In this order: what fails fast comes first. How each is shared out: the host's and the browser's tests by file
# (tests/conftest.py), for those of a file share what they need; the others one by one, so that all cores end together.
SUITES = {"core": "worksteal", "inhost": "worksteal", "host": "loadgroup", "browser": "loadgroup"}
MOST_WORKERS = 4  # with a server each, more of them take more memory than they save time
IN_ONE_PROCESS = ("-s", "--capture=no", "--pdb", "--trace", "-n", "--numprocesses", "--co", "--collect-only")
# `--quick`: what is worth running between commits, in under a minute.
QUICK = {"core": ["-m", "not slow"], "inhost": ["-m", "smoke"]}
# The miniature's tensors are small: more threads only wait for each other, and every core has a worker.
ONE_THREAD = {**THREADS, "OMP_NUM_THREADS": "1"}
ALL = "ZIPLORA_ALL"  # set: every test draws as many random cases as it can (`--all`)
COVERAGE = "--cov"
NO_TESTS = 5  # pytest's exit status where nothing was collected
SLOWEST = 10


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


@dataclass
class Plan:
    """What to run. paths: by suite; options: pytest's; narrowed: not all that there is, so a suite may have no test."""

    paths: dict[str, list[str]]
    options: list[str] = field(default_factory=list)
    quick: bool = False
    every_case: bool = False
    measured: dict[str, str] = field(default_factory=dict)  # variables that have processes measure themselves

    @property
    def narrowed(self) -> bool:
        return bool(self.options) or any(not self.is_whole(suite) for suite in self.paths)

    def is_whole(self, suite: str) -> bool:
        return self.paths[suite] == [str(ROOT / "tests" / suite)]

    def workers(self, suite: str) -> int:
        """Processes to share a suite among; 1: none but pytest's own."""
        alone = any(option.startswith(IN_ONE_PROCESS) for option in self.options)
        few = not self.is_whole(suite) or (self.quick and suite == "inhost")
        return 1 if alone or few else min(cores(), MOST_WORKERS)


def run_suites(host: Host, arguments: list[str]) -> int:
    """Run the suites that `arguments` name (all where none is named); 0 where nothing failed."""
    plan = make_plan([argument for argument in arguments if argument != COVERAGE])
    if COVERAGE in arguments:
        plan.measured = covered.begin()
    total = Count()
    lines = []
    for suite in plan.paths:
        print(f"\n== {suite} ==", flush=True)
        start = time.monotonic()
        count = run_suite(host, suite, plan)
        lines.append(f"{suite + ':':9}{count} in {time.monotonic() - start:.0f} s")
        total.add(count)
    reports = {suite: report_of(suite) for suite in plan.paths}
    print(f"\nslowest:\n{slowest(reports)}")
    for name, number in figures(reports).items():
        print(f"{name}: {number:g}")
    if plan.measured:
        print(f"\n{covered.report(host)}")
    print("\n" + "\n".join(lines))
    print(total)
    return 1 if total.failed or not total.passed else 0


def make_plan(arguments: list[str]) -> Plan:
    """From the words after `dev.py test`: --quick, --all, test paths, and options for pytest."""
    own = {"--quick", "--all"}
    asked = own & set(arguments)
    if asked == own:
        raise SystemExit("error: --quick and --all exclude each other.")
    paths, options = split_arguments([argument for argument in arguments if argument not in own])
    quick = "--quick" in asked
    if quick and (left := [suite for suite in paths if suite in QUICK]):
        paths = {suite: paths[suite] for suite in left}
    return Plan(paths, options, quick, "--all" in asked)


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


def cores() -> int:
    """Processor cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on Windows or macOS
    return (len(affinity(0)) if affinity else os.cpu_count()) or 1


def report_of(suite: str) -> Path:
    return DEV / "reports" / f"{suite}.xml"


def run_suite(host: Host, suite: str, plan: Plan) -> Count:
    """Run pytest over one suite in processes of its own and count from its report."""
    report = report_of(suite)
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    environment = {key: value for key, value in {**ONE_THREAD, **os.environ}.items() if key != "PYTHONPATH"}
    environment |= plan.measured
    if suite == "browser":
        environment["CHROMIUM_PATH"] = str(ensure_chromium(host))
    if plan.every_case:
        environment[ALL] = "1"
    # The program and not `python -m pytest`: that puts the working directory on sys.path, and the pack's folder
    # `nodes` would then hide ComfyUI's module of the same name.
    settings = [f"--junitxml={report}", "-o", f"cache_dir={DEV / 'pytest_cache'}"]
    workers = plan.workers(suite)
    if workers > 1:
        # A worker that dies ends the suite: one that is replaced takes up the same test, and can wait for ever.
        settings += ["-n", str(workers), "--dist", SUITES[suite], "--max-worker-restart", "0"]
    if plan.quick:
        settings += QUICK[suite]
    command = [str(host.script("pytest")), *plan.paths[suite], *settings, *plan.options]
    status = subprocess.run(command, cwd=ROOT, env=environment).returncode
    if status == NO_TESTS and plan.narrowed:
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


def slowest(reports: dict[str, Path], count: int = SLOWEST) -> str:
    """The tests that took longest, set-up and clean-up with them, a line each."""
    times = []
    for suite, report in reports.items():
        for case in cases(report):
            file = case.get("classname", "").split(".")[-1]
            times.append((float(case.get("time", 0)), f"tests/{suite}/{file}.py::{case.get('name')}"))
    return "\n".join(f"{seconds:7.1f} s  {name}" for seconds, name in sorted(times, reverse=True)[:count])


def figures(reports: dict[str, Path]) -> dict[str, float]:
    """Numbers that tests have noted in `request.node.user_properties`, added up by name."""
    sums: dict[str, float] = {}
    for report in reports.values():
        for case in cases(report):
            for noted in case.iter("property"):
                name = noted.get("name", "")
                sums[name] = sums.get(name, 0.0) + float(noted.get("value", 0))
    return sums


def cases(report: Path) -> list[ElementTree.Element]:
    return list(ElementTree.parse(report).iter("testcase")) if report.is_file() else []
