"""Which lines of the core and the nodes the suites run: `python3 dev.py test --cov` (standard library only).

Every process of a run that the environment variable reaches is measured: pytest, its workers, and the servers that
tests start. Settings and data lie in .dev/coverage/.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from .host import DEV, ROOT, Host

FOLDER = DEV / "coverage"
SETTINGS = FOLDER / "settings.ini"
PARTS = ("ziplora_core", "nodes/bridge", "nodes")  # the last: schemas and their calls, with the bridge


def begin() -> dict[str, str]:
    """Forget what was measured before; the variables that have Python processes measure themselves."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    sources = "\n".join(f"    {ROOT / name}" for name in ("ziplora_core", "nodes"))
    # sigterm: how a server is ended; _exit: how a worker of pytest-xdist ends.
    SETTINGS.write_text(
        f"[run]\nsource =\n{sources}\ndata_file = {FOLDER / 'data'}\nparallel = true\nsigterm = true\npatch = _exit\n",
        encoding="utf-8",
    )
    return {"COVERAGE_PROCESS_START": str(SETTINGS)}


def report(host: Host) -> str:
    """A line for each file with lines that did not run, and the shares of core, bridge and all of nodes/."""
    _coverage(host, "combine", "--quiet")
    table = _coverage(host, "report", "--skip-covered", "--show-missing")
    shares = [
        f"coverage of {part}: {_coverage(host, 'report', '--format=total', '--precision=1', *_only(part)).strip()} %"
        for part in PARTS
    ]
    return "\n".join([table, *shares])


def _only(part: str) -> tuple[str, str]:
    return "--include", str(ROOT / Path(part) / "*")


def _coverage(host: Host, command: str, *options: str) -> str:
    arguments = [str(host.python), "-m", "coverage", command, f"--rcfile={SETTINGS}", *options]
    done = subprocess.run(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout
