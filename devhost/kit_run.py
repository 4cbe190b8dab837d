"""Measures the pack on this machine, without network: `python3 kit/run.py` (standard library only).

    python3 kit/run.py                    all of it, in nine minutes at most
    python3 kit/run.py --minutes 4        the first part of it
    python3 kit/run.py --device cpu       a rehearsal, on the processor

What is measured stands in sdxl.json after every part, and at the end in figures.json and figures.md beside it
(`--output`; this folder's `results`). Python needs torch, torchvision, transformers and numpy; of the packages that
the kit brings, those are used that this Python lacks, from a temporary folder: nothing is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib import metadata, util
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
NEEDED = (
    *("torch", "torchvision", "transformers", "tokenizers", "numpy", "scipy"),
    *("PIL", "yaml", "matplotlib", "huggingface_hub", "regex", "requests"),
)
SUITE_SECONDS = 60.0  # less is left: the tests are not begun
GRACE_SECONDS = 15.0
ON_A_PROCESSOR = ("--steps", "1", "--skip", "default", "dense", "apply", "train")
LIMITS = ("24", "16", "12", "8")
NOT_FOR_THE_KIT = ("test_library_*",)  # they need the libraries that write LoRA files


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=9.0, help="everything ends by then")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--tests", default="", help="pytest's -k: which of the tests; all where empty")
    parser.add_argument("--skip", nargs="*", default=[], help="parts of benchmarks/sdxl.py to leave out")
    return parser.parse_args()


def lacking() -> list[str]:
    """Modules that are needed, that this Python has not and that the kit does not bring."""
    return [name for name in NEEDED if util.find_spec(name) is None]


def unpack(folder: Path) -> tuple[Path, Path, list[str]]:
    """(checkout, ComfyUI's tree, the packages brought that this Python lacks), in `folder`; the last are in `site`."""
    tree, site = folder / "comfyui", folder / "site"
    unzip(HERE / "comfyui.zip", tree)
    site.mkdir()
    if (HERE / "checkout.zip").is_file():
        checkout = folder / "checkout"
        unzip(HERE / "checkout.zip", checkout)
    else:
        checkout = next((path for path in HERE.parents if (path / "ziplora_core").is_dir()), HERE)
        if checkout == HERE:
            raise SystemExit("error: this kit has no checkout, and no folder above it is one: put it into a checkout.")
    taken = []
    for archive in sorted((HERE / "packages").glob("*.zip")):
        name = archive.name.split("-")[0]
        if not has(name):
            unzip(archive, site)
            taken.append("-".join(archive.name.split("-")[:2]))
    return checkout, tree, taken


def unzip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)


def has(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def call(command: list[str], checkout: Path, environment: dict[str, str], seconds: float) -> tuple[int | None, str]:
    """(exit status or None where the time was over, the last of what it said); all of it is printed as it comes.

    Whatever ends this, also ends what it started.
    """
    print(f"\n$ {' '.join(command[1:])}", flush=True)
    with tempfile.NamedTemporaryFile("ab") as said, open(said.name, encoding="utf-8", errors="replace") as heard:
        process = subprocess.Popen(
            command, cwd=checkout, env=environment, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        end, status = time.monotonic() + seconds, None
        try:
            while status is None and time.monotonic() < end:
                time.sleep(0.2)
                status = process.poll()
                print(heard.read(), end="", flush=True)
        finally:
            if status is None:
                stop(process)
        heard.seek(0)
        return status, heard.read()[-4000:]


def stop(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C does; then the process with all that it has started."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tests_of(outcomes: Path) -> dict[str, Any]:
    """Counts, and the names of what failed, of a file that `kit_tests.py` wrote; empty where no test has ended."""
    if not outcomes.is_file():
        return {}
    found: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": []}
    worst = ("passed", "skipped", "failed")
    of: dict[str, str] = {}
    for line in outcomes.read_text(encoding="utf-8").splitlines():
        name, outcome = json.loads(line)
        of[name] = max(of.get(name, "passed"), outcome, key=worst.index)  # a test may also fail after it has passed
    for name, outcome in of.items():
        found[outcome] += 1
        if outcome == "failed":
            found["failures"].append(name)
    return found


def page(figures: dict[str, Any]) -> str:
    """The figures as a person reads them."""
    sdxl, suite = figures.get("sdxl", {}), figures.get("tests", {})
    top = sdxl.get("ceilings", {})
    lines = [
        "# ZipLoRA on this machine",
        "",
        f"{sdxl.get('device', 'no figures')}, torch {sdxl.get('torch', '?')}, {sdxl.get('size', '?')} pixels, "
        f"{sdxl.get('dtype', '?')}; {figures['seconds']:.0f} s in all.",
        f"Ceilings: {top.get('tflops', 0):.0f} TFLOP/s in a matrix product, {top.get('copy_gb_s', 0):.0f} GB/s copied.",
        "",
        "| | seconds | TFLOP/s | of the ceiling | peak GB |",
        "| --- | --- | --- | --- | --- |",
    ]
    steps = {**sdxl.get("steps", {}), "published algorithm": sdxl.get("dense")}
    steps["published algorithm"] = {**(sdxl.get("dense") or {}), "tflop": steps.get("as planned", {}).get("tflop")}
    rows = {f"a step, {name}": found for name, found in steps.items()}
    rows |= {name: sdxl.get(key) for key, name in WHOLE.items()}
    limits = {card: of for card, of in sdxl.get("limits", {}).items() if card != "failed"}
    rows |= {f"{card}: {part}": of.get(part) for card, of in limits.items() for part in ("step", "zip")}
    for name, found in rows.items():
        if found and "seconds" in found:
            rate = found["tflop"] / found["seconds"] if found.get("tflop") else None
            speed = f"{rate:.1f} | {rate / top['tflops']:.0%}" if rate else " | "
            lines.append(f"| {name} | {found['seconds']:.2f} | {speed} | {found['peak'] / 1e9:.2f} |")
    failed = {**sdxl.get("failed", {}), **figures.get("problems", {})}
    failed |= sdxl.get("limits", {}).get("failed", {})
    failed |= {f"{card}: {part}": why for card, of in limits.items() for part, why in of.get("failed", {}).items()}
    for name, words in failed.items():
        lines += ["", f"**{name}**: {words}"]
    if suite:
        counts = f"{suite['passed']} passed, {suite['failed']} failed, {suite['skipped']} skipped"
        cut = "" if suite["ended"] else " until the time was over"
        lines += [
            "",
            f"Tests inside ComfyUI on this device: {counts}{cut}.",
            *(f"- {name}" for name in suite["failures"]),
        ]
    return "\n".join(lines) + "\n"


WHOLE = {
    "default": "a whole zip, default",
    "start": "layer-wise, then 20 steps",
    "paper": "a whole zip, the paper's",
    "train": "a training step",
}


def main() -> int:
    given, began = parse(), time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was started is ended with this
    missing = lacking()
    if missing:
        print(f"error: this Python has no {', '.join(missing)}, which the kit does not bring: run it with another.")
        return 1
    given.output.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {"python": sys.version.split()[0], "device": given.device, "problems": {}}

    def left() -> float:
        return float(60 * given.minutes) - (time.monotonic() - began)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        checkout, tree, figures["brought"] = unpack(Path(name))
        brought = str(Path(name) / "site")
        paths = os.pathsep.join(filter(None, (brought, os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "COMFYUI_PATH": str(tree), "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
        sdxl = given.output.resolve() / "sdxl.json"
        sdxl.unlink(missing_ok=True)
        command = [sys.executable, "benchmarks/sdxl.py", "--device", given.device, "--json", str(sdxl)]
        more = ["--limits", *LIMITS, "--skip"] if given.device == "cuda" else [*ON_A_PROCESSOR]
        status, said = call([*command, *more, *given.skip], checkout, environment, 0.7 * left())
        figures["sdxl"] = json.loads(sdxl.read_text(encoding="utf-8")) if sdxl.is_file() else {}
        if status:
            figures["problems"]["benchmarks/sdxl.py"] = said.strip().splitlines()[-1] if said.strip() else str(status)
        elif status is None:
            figures["problems"]["benchmarks/sdxl.py"] = "stopped where its time was over"
        save(figures, given.output, began)
        if left() > SUITE_SECONDS:
            figures["tests"] = suite(given, checkout, environment, Path(name) / "outcomes", left() - GRACE_SECONDS - 5)
        else:
            figures["problems"]["tests"] = "not begun: too little time was left"
    save(figures, given.output, began)
    print(f"\n{(given.output / 'figures.md').read_text(encoding='utf-8')}\n{given.output / 'figures.json'}")
    return 0


def suite(
    given: argparse.Namespace, checkout: Path, environment: dict[str, str], outcomes: Path, seconds: float
) -> dict[str, Any]:
    """The tests inside ComfyUI, on the device; shared out, and stopped where the time is over."""
    device = "cpu" if given.device == "cpu" else "auto"
    workers = str(min(8, max(1, (os.cpu_count() or 2) // 2))) if device == "auto" else str(os.cpu_count() or 1)
    options = ["tests/inhost", "-q", "-n", workers, "-p", "no:cacheprovider"]
    options += ["--dist", "worksteal", *(["-k", given.tests] if given.tests else [])]
    options += [f"--ignore-glob=*/{name}" for name in NOT_FOR_THE_KIT]
    environment = {**environment, "ZIPLORA_TEST_DEVICE": device, "OMP_NUM_THREADS": "1"}
    # -P: the checkout's folder `nodes` must not hide ComfyUI's module of that name.
    command = [sys.executable, "-P", str(checkout / "devhost" / "kit_tests.py"), str(outcomes), *options]
    status, said = call(command, checkout, environment, seconds)
    none = {"passed": 0, "failed": 0, "skipped": 0, "failures": []}
    if status is not None:
        none |= {"failed": 1, "failures": [said.strip()[-500:]]}
    return {**(tests_of(outcomes) or none), "ended": status is not None}


def save(figures: dict[str, Any], folder: Path, began: float) -> None:
    figures["seconds"] = time.monotonic() - began
    (folder / "figures.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    (folder / "figures.md").write_text(page(figures), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
