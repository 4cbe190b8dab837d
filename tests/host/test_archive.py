"""What the registry would ship, alone in a bare ComfyUI: no checkout around it, no miniature, no other pack."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pathspec

from devhost.base import FOLDERS, NODES, PACK
from devhost.host import current_host
from devhost.server import ComfyServer


def unpack(root: Path, target: Path) -> None:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.splitlines()
    ignored = pathspec.GitIgnoreSpec.from_lines((root / ".comfyignore").read_text(encoding="utf-8").splitlines())
    for name in files:
        if not ignored.match_file(name) and (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, target / name)


def test_the_archive_works_in_a_bare_host(root: Path, tmp_path: Path) -> None:
    for folder in FOLDERS:
        (tmp_path / folder).mkdir(parents=True)
    pack = tmp_path / "custom_nodes" / PACK
    unpack(root, pack)
    assert not (pack / "tests").exists() and not (pack / "demo").exists()
    with ComfyServer(tmp_path) as server:
        info = server.object_info()
        assert not [name for name in NODES if name not in info], server.log_tail()
        assert not [line for line in server.log().splitlines() if "IMPORT FAILED" in line and PACK in line]
        assert server.session.get(f"{server.url}/extensions/{PACK}/docs/LoadLoRAPair.md").ok
        assert "5 Every step, with pictures" in str(server.get("workflow_templates").get(PACK))
    said = subprocess.run([sys.executable, "-m", "ziplora_batch", "--help"], cwd=pack, capture_output=True, text=True)
    assert said.returncode == 0 and "again" in said.stdout, said.stderr


def asked_for(requirements: Path) -> set[str]:
    """Distributions that a requirements file names, as packaging compares names."""
    names = re.findall(r"^[A-Za-z0-9][\w.-]*", requirements.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower() for name in names}


def imported(folder: Path) -> set[str]:
    """First names of all absolute imports below a folder, inside functions too."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            found |= {name.partition(".")[0] for name in names}
    return found - sys.stdlib_module_names


def test_the_host_and_the_shipped_requirements_bring_every_import(root: Path, tmp_path: Path) -> None:
    """Not what happens to be installed here: what the host's own list and ours ask for."""
    unpack(root, tmp_path)
    tree = current_host().tree
    ours = asked_for(tmp_path / "requirements.txt")
    assert ours == {"matplotlib"}
    there = asked_for(tree / "requirements.txt") | ours
    of_tree = {path.stem for path in tree.iterdir() if path.suffix == ".py" or (path.is_dir() and path.name[0] != ".")}
    brought = packages_distributions()
    missing, used = {}, set()
    for folder in ("nodes", "ziplora_core"):
        for name in imported(tmp_path / folder) - of_tree:
            by = {re.sub(r"[-_.]+", "-", distribution).lower() for distribution in brought.get(name, [])}
            used |= by
            if not by & there:
                missing[name] = by
    assert not missing
    assert ours <= used, "a requirement that nothing imports"
