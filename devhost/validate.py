"""Check every shipped graph with comfy-cli's offline validator: `python3 dev.py validate`.

comfy-cli lives in an environment of its own, since it asks for other versions than ComfyUI does. The names of files
that a user replaces are put among the choices; everything else must be as the server says.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .base import make_base
from .host import DEV, ROOT
from .server import ComfyServer
from .templates.words import CLIP, DINO, MODEL, PICTURES, STYLE, SUBJECT, THIRD, WHOLE
from .workflows import api_file, ui_files

CLI = DEV / "venv-comfy-cli"
CHOICES = {  # input -> what stands in the graphs
    ("CheckpointLoaderSimple", "ckpt_name"): [MODEL],
    ("ZipLoRAs", "subject_lora"): [SUBJECT],
    ("ZipLoRAs", "style_lora"): [STYLE],
    ("ZipCheck", "subject_lora"): [SUBJECT],
    ("ZipCheck", "style_lora"): [STYLE],
    ("LoraLoader", "lora_name"): [SUBJECT, STYLE, THIRD],
    ("LoadLoRAPair", "content_lora"): [SUBJECT],
    ("LoadLoRAPair", "style_lora"): [STYLE],
    ("LoadImage", "image"): [*PICTURES, WHOLE],
    ("CLIPVisionLoader", "clip_name"): [CLIP, DINO],
    ("CLIPLoader", "clip_name"): [CLIP],
}


def validator() -> Path:
    """The `comfy` command, installed where it is not yet."""
    scripts = CLI / ("Scripts" if sys.platform == "win32" else "bin")
    if not any(scripts.glob("comfy*")):
        subprocess.run([sys.executable, "-m", "venv", str(CLI)], check=True)
        subprocess.run([str(scripts / "python"), "-m", "pip", "install", "-q", "comfy-cli"], check=True)
    return scripts / "comfy"


def object_info() -> dict[str, Any]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as base:
        with ComfyServer(make_base(Path(base), miniature=False)) as server:
            info = server.object_info()
    for (node, name), files in CHOICES.items():
        spec = info[node]["input"]["required"][name]
        (spec[0] if isinstance(spec[0], list) else spec[1]["options"]).extend(files)
    return info


def main() -> int:
    command, failed = validator(), 0
    with tempfile.TemporaryDirectory() as folder:
        known = Path(folder) / "object_info.json"
        known.write_text(json.dumps(object_info()), encoding="utf-8")
        for file in (path for ui_file in ui_files() for path in (ui_file, api_file(ui_file))):
            asked = [str(command), "--json", "workflow", "validate", "--workflow", str(file), "--input", str(known)]
            answer = subprocess.run(
                asked, capture_output=True, text=True, env={**os.environ, "DO_NOT_TRACK": "1", "HOME": folder}
            )
            said = json.loads(answer.stdout.strip().splitlines()[-1])
            problems = [error["message"] for error in (said["data"] or {}).get("errors", [])] if not said["ok"] else []
            failed += not said["ok"]
            verdict = "valid" if said["ok"] else "; ".join(problems) or str(said.get("error"))
            print(f"{file.relative_to(ROOT).as_posix()}: {verdict}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
