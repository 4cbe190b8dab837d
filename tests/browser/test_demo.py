"""The demo from its command line to its pictures, at a size that a test can afford."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

from demo.run import DIALS


def test_quick_demo_draws_scores_and_names_its_pictures(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "demo/run.py", "--quick", "--output", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    ended = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for line in ("base model, its own words: of 2", "direct merge ", *(f"zipped, style {dial:g} " for dial in DIALS)):
        assert line in ended.stdout
    assert "solver: layerwise" in ended.stdout
    written = [Path(line.strip()) for line in ended.stdout.split("Pictures:\n")[1].splitlines()]
    assert written[0] == tmp_path / "comparison.png" and len(written) == 1 + 2 + 1 + len(DIALS)
    for path in written:
        with Image.open(path) as picture:
            picture.verify()
