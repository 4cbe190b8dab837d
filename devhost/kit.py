"""Writes the kit: all that a machine with a GPU and no network needs to measure this pack (standard library only).

    python3 dev.py kit FOLDER            for Python 3.12 on Linux, x86-64
    python3 FOLDER/run.py                there: the figures, in under nine minutes

The folder holds the checkout and ComfyUI's tree without what neither needs for that, and the wheels that a machine
with torch, torchvision, transformers and the usual scientific packages lacks; everything is packed, at most 60 MB. A
machine that has a checkout takes a kit without one (`--without-checkout`), which run.py looks for above its folder.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

from .host import ROOT, Host, SetupError
from .install import pinned, pip

RUNNER = Path(__file__).with_name("kit_run.py")
# What ComfyUI, the pack and the tests of tests/core and tests/inhost import and such a machine may lack.
CARRIED = (
    "aiohappyeyeballs",
    "aiohttp",
    "aiosignal",
    "attrs",
    "av",
    "einops",
    "execnet",
    "frozenlist",
    "hypothesis",
    "iniconfig",
    "multidict",
    "pluggy",
    "propcache",
    "psutil",
    "pytest",
    "pytest-xdist",
    "safetensors",
    "sortedcontainers",
    "torchsde",
    "tqdm",
    "trampoline",
    "yarl",
)
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(5, 40)] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
CHECKOUT = (
    *("ziplora_core", "nodes", "ziplora_batch", "benchmarks", "demo", "devhost", "tests/core", "tests/inhost"),
    *("tests/conftest.py", "locales", "web", "workflows", "recipes", "__init__.py", "dev.py", "pyproject.toml"),
    "requirements.txt",
)
NOT_NEEDED = (".jpg", ".webp", ".jsonl", ".md")  # of the checkout; pictures that tests read are PNGs
TREE = ("comfy", "comfy_api", "comfy_config", "comfy_execution", "comfy_extras", "app", "utils", "middleware")
LARGEST = 60_000_000


def write(host: Host, folder: Path, python: str, checkout: bool) -> int:
    """Write the folder, which must not exist, whole or not at all; its size in bytes.

    Raises SetupError where a wheel cannot be had, and where the folder comes out too large.
    """
    if folder.exists():
        raise SetupError(f"{folder} exists: name a folder that does not, or remove it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        partial = Path(name) / "kit"
        partial.mkdir()
        shutil.copyfile(RUNNER, partial / "run.py")
        pack(partial / "comfyui.zip", host.tree, tree_files(host.tree))
        if checkout:
            pack(partial / "checkout.zip", ROOT, checkout_files())
        (partial / "packages").mkdir()
        for wheel in wheels(host, Path(name), python):
            repack(wheel, partial / "packages" / wheel.with_suffix(".zip").name)
        size = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
        if size > LARGEST:
            raise SetupError(f"The kit would take {size / 1e6:.1f} MB, more than {LARGEST / 1e6:.0f}: carry less.")
        partial.rename(folder)
    return size


def tree_files(tree: Path) -> list[Path]:
    """What of ComfyUI is imported: its packages and the files beside them."""
    inside = [path for name in TREE for path in (tree / name).rglob("*")]
    return sorted(p for p in (*tree.glob("*.py"), *inside) if p.is_file() and "__pycache__" not in p.parts)


def checkout_files() -> list[Path]:
    """Tracked files, and those that are not ignored, of the folders that are needed."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *CHECKOUT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SetupError(f"git cannot list the files of {ROOT} ({done.stderr.strip()}): a kit is made in a checkout.")
    files = [ROOT / name for name in done.stdout.split("\0") if name and not name.endswith(NOT_NEEDED)]
    return sorted(path for path in files if path.is_file())


def wheels(host: Host, folder: Path, python: str) -> list[Path]:
    """Download the wheels of `CARRIED`, in the versions of pins.txt, for that Python on Linux."""
    options = ["--no-deps", "--only-binary", ":all:", "--python-version", python, "--implementation", "cp"]
    options += [word for platform in PLATFORMS for word in ("--platform", platform)]
    wanted = [pinned(package) for package in CARRIED]
    pip(host, ["download", *options, "--dest", str(folder), *wanted], "fetching the kit's wheels")
    return sorted(folder.glob("*.whl"))


def pack(archive: Path, root: Path, files: Iterable[Path]) -> None:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_LZMA) as packed:
        for path in files:
            packed.write(path, path.relative_to(root))


def repack(wheel: Path, archive: Path) -> None:
    """A wheel's content, packed a quarter smaller."""
    with zipfile.ZipFile(wheel) as given, zipfile.ZipFile(archive, "w", zipfile.ZIP_LZMA) as packed:
        for name in given.namelist():
            packed.writestr(name, given.read(name))


def main(host: Host, arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="dev.py kit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path("kit"))
    parser.add_argument("--python", default="3.12", help="of the machine that the kit is for")
    parser.add_argument("--without-checkout", action="store_true", help="for a machine that has one")
    given = parser.parse_args(arguments)
    size = write(host, given.folder.resolve(), given.python, not given.without_checkout)
    print(f"{given.folder}: {size / 1e6:.1f} MB. On the machine: python3 {given.folder.name}/run.py")
    return 0
