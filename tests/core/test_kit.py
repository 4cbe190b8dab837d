"""The kit for a machine without network: what it holds, and its runner over a checkout in small."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from devhost import host, kit, kit_run, kit_tests

SDXL = """
import json, pathlib, sys, time
import carried
at = pathlib.Path(sys.argv[sys.argv.index("--json") + 1])
step = {"seconds": 0.5, "peak": 3e9, "tflop": 100.0}
figures = {"device": "a card", "torch": "2", "size": 1024, "dtype": "bf16", "ceilings": {"tflops": 400, "copy_gb_s": 9}}
figures |= {"steps": {"as planned": step}, "dense": {"seconds": 1.0, "peak": 4e9}, "failed": {"paper": "no room"}}
small = {"zip": {"seconds": 2.0, "peak": 7.5e9}, "failed": {"step": "OutOfMemoryError: none left"}}
figures |= {"limits": {"8 GB": small, "failed": {"12 GB": "no card"}}}
at.write_text(json.dumps(figures))
time.sleep(float(carried.SLEEP))
"""
TEST = """
import os
def test_right(): assert os.environ["ZIPLORA_TEST_DEVICE"] == "cpu" and os.path.isdir(os.environ["COMFYUI_PATH"])
def test_wrong(): assert 0
"""
TESTER = Path(kit_tests.__file__).read_text(encoding="utf-8")


def packed(path: Path, **files: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name.replace("__", "/") + ".py", text)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    folder = tmp_path / "kit"
    (folder / "packages").mkdir(parents=True)
    shutil.copyfile(kit.RUNNER, folder / "run.py")
    packed(folder / "comfyui.zip", comfy="")
    packed(folder / "checkout.zip", benchmarks__sdxl=SDXL, tests__inhost__test_it=TEST, devhost__kit_tests=TESTER)
    packed(folder / "packages" / "carried-1-py3-none-any.zip", carried="SLEEP = 0")
    packed(folder / "packages" / "numpy-0-py3-none-any.zip", numpy="raise ImportError('the machine has its own')")
    return folder


def run(folder: Path, *options: str) -> tuple[str, dict]:
    command = [sys.executable, str(folder / "run.py"), "--device", "cpu", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return (folder / "results" / "figures.md").read_text(), json.loads(
        (folder / "results" / "figures.json").read_text()
    )


def test_the_runner_measures_tests_and_says_what_failed(small: Path) -> None:
    page, figures = run(small)
    assert figures["brought"] == ["carried-1"], "only what this Python lacks"
    assert "| a step, as planned | 0.50 | 200.0 | 50% | 3.00 |" in page
    assert "| a step, published algorithm | 1.00 | 100.0 | 25% | 4.00 |" in page
    assert "| 8 GB: zip | 2.00 |" in page and "**paper**: no room" in page
    assert "**8 GB: step**: OutOfMemoryError: none left" in page and "**12 GB**: no card" in page
    assert "1 passed, 1 failed, 0 skipped" in page and "test_it.py::test_wrong" in page
    assert figures["problems"] == {}


def test_what_was_started_ends_with_the_runner(small: Path, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    script = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    packed(small / "checkout.zip", benchmarks__sdxl=script, tests__inhost__test_it=TEST)
    running = subprocess.Popen([sys.executable, str(small / "run.py"), "--device", "cpu"], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not (pid.is_file() and pid.read_text()) and time.monotonic() < end:
        time.sleep(0.1)
    running.terminate()
    assert running.wait(60) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_what_the_tests_found_stays_where_they_are_killed(tmp_path: Path) -> None:
    script = tmp_path / "test_it.py"
    script.write_text(
        """
import os, pytest
def test_right(): pass
def test_wrong(): assert 0
@pytest.fixture
def spoilt(): yield; assert 0
def test_wrong_at_its_end(spoilt): pass
@pytest.mark.skip
def test_skipped(): pass
def test_killed(): os.kill(os.getpid(), 9)
"""
    )
    outcomes = tmp_path / "outcomes"
    command = [sys.executable, "-P", kit_tests.__file__, str(outcomes), str(script), "-p", "no:cacheprovider"]
    assert subprocess.run(command, capture_output=True, cwd=tmp_path).returncode == -9
    assert kit_run.tests_of(outcomes) == {
        "passed": 1,
        "failed": 2,
        "skipped": 1,
        "failures": [f"test_it.py::{name}" for name in ("test_wrong", "test_wrong_at_its_end")],
    }


def test_tests_of_which_none_has_ended_are_none_that_failed(small: Path) -> None:
    packed(
        small / "checkout.zip",
        benchmarks__sdxl=SDXL,
        tests__inhost__test_it="def test(): __import__('time').sleep(600)",
        devhost__kit_tests=TESTER,
    )
    given = SimpleNamespace(device="cpu", tests="")
    with zipfile.ZipFile(small / "checkout.zip") as archive:
        archive.extractall(small / "checkout")
    found = kit_run.suite(given, small / "checkout", {**os.environ, "COMFYUI_PATH": ""}, small / "outcomes", 2.0)
    assert found == {"passed": 0, "failed": 0, "skipped": 0, "failures": [], "ended": False}


def test_a_part_that_takes_too_long_is_stopped_and_its_figures_stay(small: Path) -> None:
    packed(small / "packages" / "carried-1-py3-none-any.zip", carried="SLEEP = 600")
    began = time.monotonic()
    page, figures = run(small, "--minutes", "0.2")
    assert time.monotonic() - began < 120
    assert figures["sdxl"]["device"] == "a card" and "3.00" in page
    assert figures["problems"] == {
        "benchmarks/sdxl.py": "stopped where its time was over",
        "tests": "not begun: too little time was left",
    }


def test_the_kit_holds_what_is_imported_and_nothing_that_is_large() -> None:
    files = {path.relative_to(host.ROOT).as_posix() for path in kit.checkout_files()}
    assert {
        "benchmarks/sdxl.py",
        "tests/inhost/conftest.py",
        "tests/conftest.py",
        "demo/weights/miniature_sdxl.safetensors",
    } <= files
    assert not any(name.startswith(("tests/host", "tests/browser", "docs/", ".dev/")) for name in files)
    tree = host.DEV / "comfyui"
    if tree.is_dir():
        inside = {path.relative_to(tree).as_posix() for path in kit.tree_files(tree)}
        assert {"main.py", "nodes.py", "comfy/ops.py", "comfy/sd1_tokenizer/vocab.json"} <= inside
        assert not any(name.startswith(("models/", "output/", "temp/", "web/")) for name in inside)
