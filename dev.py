#!/usr/bin/env python3
"""One command for everything that a developer of this pack does (standard library only, Python 3.11 or newer).

    python3 dev.py setup       a virtual environment and a real ComfyUI under .dev/
    python3 dev.py demo        zip a subject and a style LoRA inside ComfyUI, and write pictures
    python3 dev.py test        every test; paths and pytest's own options narrow it down
                --quick        for the work between commits, under a minute: no server, nothing that takes long
                --all          with every random case that a nightly run has time for
                --cov          and which lines of ziplora_core and nodes they ran
    python3 dev.py serve       a ComfyUI with the pack and the miniature model, to use by hand
    python3 dev.py lint        ruff and mypy
    python3 dev.py mutants     deliberate faults, each against the tests that should notice it (minutes to an hour)
    python3 dev.py train       train the miniature model again from nothing, or PARTS of it (hours on a CPU)
    python3 dev.py workflows   write workflows/ and workflows/api/ through the real frontend, and what nodes say
    python3 dev.py validate    every graph through comfy-cli's validator
    python3 dev.py run FILE    run a Python file in the environment
    python3 dev.py kit FOLDER  what measures the pack on a machine with a GPU and no network
    python3 dev.py lock        write the environment's versions into devhost/pins.txt
    python3 dev.py clean       remove what set-up made

COMFYUI_PATH, COMFYUI_PYTHON, COMFYUI_FRONTEND and CHROMIUM_PATH name a ComfyUI, a Python, a frontend and a Chromium of
your own;
ZIPLORA_TEST_DEVICE=auto lets the tests and the benchmarks of the miniature use the GPU that ComfyUI finds,
and ZIPLORA_MINIATURE names a folder with another miniature model, laid out as demo/ is.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys

from devhost.base import MissingMiniature, link, make_base
from devhost.chromium import ensure_chromium
from devhost.host import DEV, ROOT, THREADS, Host, SetupError
from devhost.install import freeze, set_up
from devhost.kit import main as write_kit
from devhost.mutants import run_mutants
from devhost.suites import run_suites

# What set-up and the tests leave under .dev/.
MADE = ("venv*", "comfyui", "comfyui.partial", "dl", "base", "reports", "coverage", "*_cache", "types", "setup.log")


def main(arguments: list[str]) -> int:
    """Run one command; its exit status is ours."""
    commands = {
        "setup": setup,
        "demo": demo,
        "test": test,
        "serve": serve,
        "lint": lint,
        "mutants": mutants,
        "train": train,
        "workflows": workflows,
        "validate": validate,
        "run": run,
        "kit": kit,
        "lock": lock,
        "clean": clean,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=commands, metavar="command", help=", ".join(commands))
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="passed on")
    given = parser.parse_args(arguments)
    try:
        return commands[given.command](given.rest)
    except (SetupError, MissingMiniature) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def setup(rest: list[str]) -> int:
    host = set_up()
    print(f"ComfyUI: {host.tree}\nPython: {host.python}")
    return 0


def demo(rest: list[str]) -> int:
    return python(set_up(), "demo/run.py", *rest)


def test(rest: list[str]) -> int:
    return run_suites(set_up(), rest)


def serve(rest: list[str]) -> int:
    host = set_up()
    base = make_base(DEV / "base")
    return python(host, "-m", "devhost.server", "--base", str(base), *rest)


def lint(rest: list[str]) -> int:
    host = set_up()
    types = DEV / "types"
    types.mkdir(exist_ok=True)
    link(ROOT, types / "ziplora_pack")  # the nodes import from above their own folder: they are part of a package
    checks = ("ruff check .", "ruff format --check .", "mypy", "mypy -p ziplora_pack.nodes")
    return max(python(host, "-m", *check.split(), MYPYPATH=str(types)) for check in checks)


def mutants(rest: list[str]) -> int:
    return run_mutants(rest)


def train(rest: list[str]) -> int:
    host = set_up()
    return python(host, "-m", "demo.training.train", *rest, "--comfyui", str(host.tree))


def workflows(rest: list[str]) -> int:
    host = set_up()
    return python(host, "-m", "devhost.workflows", *rest, CHROMIUM_PATH=str(ensure_chromium(host)))


def validate(rest: list[str]) -> int:
    return python(set_up(), "-m", "devhost.validate", *rest)


def run(rest: list[str]) -> int:
    return python(set_up(), *rest)


def kit(rest: list[str]) -> int:
    return write_kit(set_up(), rest)


def lock(rest: list[str]) -> int:
    freeze(set_up())
    return 0


def clean(rest: list[str]) -> int:
    for name in MADE:
        for path in DEV.glob(name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return 0


def python(host: Host, *arguments: str, **environment: str) -> int:
    """Run the environment's Python at the root of the checkout, which it can import from."""
    settings = {**THREADS, **os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([str(host.python), *arguments], cwd=ROOT, env=settings).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
