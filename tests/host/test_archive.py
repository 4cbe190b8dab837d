"""What the registry would ship, alone in a bare ComfyUI: no checkout around it, no miniature, no other pack."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pathspec

from devhost.base import FOLDERS, NODES, PACK
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
        assert "ziplora_sdxl" in str(server.get("workflow_templates").get(PACK))
    said = subprocess.run([sys.executable, "-m", "ziplora_batch", "--help"], cwd=pack, capture_output=True, text=True)
    assert said.returncode == 0 and "again" in said.stdout, said.stderr
