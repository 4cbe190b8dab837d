"""Training through the queue of a real server: the shipped graph from pictures, going on from its file, refusals."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from demo.manifest import read_manifest
from demo.templates import on_the_miniature
from devhost.answers import ExecutionFailed, Prompt
from devhost.host import ROOT
from devhost.server import ComfyServer
from devhost.workflows import FOLDER, api_file


def shipped(name: str, steps: int = 4) -> Prompt:
    prompt = json.loads(api_file(FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    made = on_the_miniature(prompt, read_manifest(), steps=2)
    for entry in made.values():
        if entry["class_type"] in ("TrainConceptLoRA", "UnZipLoRA"):
            entry["inputs"] |= {"steps": steps, "rank": 4}
        if entry["class_type"] == "ZipLoRAOptimize":
            entry["inputs"] |= {"steps": 1, "drawn_references": 1}
    return made


def only(prompt: Prompt, kind: str) -> str:
    return next(key for key, entry in prompt.items() if entry["class_type"] == kind)


def test_from_pictures_to_a_picture_and_on_from_the_file(server: ComfyServer) -> None:
    prompt = shipped("7 LoRAs from pictures")
    done = server.run(prompt)
    assert done.images(only(prompt, "SaveImage"))[0].std() > 5
    listed = server.object_info()["LoraLoader"]["input"]["required"]["lora_name"][0]
    trained = [name for name in listed if re.fullmatch(r"(subject|style)_\d{5}_\.safetensors", name)]
    assert len(trained) == 2, "output/loras is a folder that the host loads LoRAs from"

    train = next(key for key, entry in prompt.items() if entry["inputs"].get("filename_prefix") == "loras/subject")
    name = next(n for n in trained if n.startswith("subject"))
    assert "steps: 5 to 6" in going_on(server, prompt, train, name, report=2)


def going_on(server: ComfyServer, prompt: Prompt, train: str, name: str, report: int) -> str:
    """The report of two steps more from a file: of this node and what it needs, nothing else."""
    further, waiting = {train: copy.deepcopy(prompt[train])}, [train]
    while waiting:
        for value in prompt[waiting.pop()]["inputs"].values():
            if isinstance(value, list) and value[0] not in further:
                further[value[0]] = copy.deepcopy(prompt[value[0]])
                waiting.append(value[0])
    steps = prompt[train]["inputs"]["steps"]
    further[train]["inputs"] |= {"continue_from": name, "steps": steps + 2}
    further["shown"] = {"class_type": "PreviewAny", "inputs": {"source": [train, report]}}
    return server.run(further).outputs["shown"]["text"][0]


def test_one_picture_taken_apart(server: ComfyServer) -> None:
    prompt = shipped("8 One picture taken apart")
    done = server.run(prompt)
    files = done.files(only(prompt, "UnZipLoRA"), "files")
    assert len(files) == 2
    for file in files:  # each once more, from what it says of itself
        command = [sys.executable, "-m", "ziplora_batch", "again", str(file), "--server", server.url]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert said.returncode == 0, said.stdout + said.stderr
    side_by_side = done.images(only(prompt, "SaveImage"))[0]
    assert side_by_side.shape[1] > 2.5 * side_by_side.shape[0] and np.std(side_by_side) > 5
    assert "apart: prompts, columns, blocks;" in done.outputs[only(prompt, "PreviewAny")]["text"][0]
    for file in files:
        assert "steps 5 to 6" in going_on(server, prompt, only(prompt, "UnZipLoRA"), file.name, report=3)


@pytest.mark.parametrize(
    ("name", "kind", "changes", "says"),
    [
        ("7 LoRAs from pictures", "TrainConceptLoRA", {"prompt": " "}, "prompt is empty"),
        ("7 LoRAs from pictures", "TrainConceptLoRA", {"prompt": "a\nb\nc"}, "images holds 1 pictures and prompt 3"),
        ("8 One picture taken apart", "UnZipLoRA", {"prompt": "a figure in vorp style"}, "prompt lacks 'fim'"),
        ("8 One picture taken apart", "UnZipLoRA", {"style_prompt": ""}, "style_prompt is empty"),
    ],
)
def test_refusals_are_one_sentence(server: ComfyServer, name: str, kind: str, changes: dict, says: str) -> None:
    prompt = shipped(name)
    prompt[only(prompt, kind)]["inputs"] |= changes
    with pytest.raises(ExecutionFailed) as caught:
        server.run(prompt)
    assert caught.value.text.startswith(says) and "\n" not in caught.value.text
