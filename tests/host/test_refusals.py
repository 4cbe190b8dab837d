"""Bad input: one sentence that names it, within a second, before a model is loaded.

Broken files and wrong settings are refused when the prompt is queued: from a file's header, for the server answers
nobody meanwhile. What a file's numbers tell fails where it is loaded, what only the model can tell (a LoRA of another
family, latents of another kind) in the optimise node.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import BASE, SIZE, Concept, Prompt, node, optimised, picture, stock_loader
from safetensors.torch import load_file, save_file

from devhost.answers import ExecutionFailed, PromptRefused
from devhost.base import CHECKPOINT
from devhost.server import ComfyServer

SECOND = 1.0  # of the server's work: on a machine that other tests keep busy too
LOADED = ("Requested to load", "loaded completely")  # what the server logs when a model goes onto a device
READ = "model weight dtype"  # what it logs when a checkpoint is read from its file


@pytest.fixture(scope="module")
def cold_server(make_server: Callable[..., ComfyServer]) -> ComfyServer:
    """A server that has loaded nothing, so that any load shows in its log."""
    return make_server()


def refused(server: ComfyServer, prompt: Prompt, node_id: str) -> list[str]:
    """What the server says, input by input, about a node of a prompt that it refuses when it is queued."""
    before, events = len(server.log()), len(server.connection.events)
    start = server.work()
    with pytest.raises(PromptRefused) as caught:
        server.queue(prompt)
    assert server.work() - start < SECOND
    assert not any(event.type == "execution_start" for event in server.connection.events[events:])
    assert not any(line in server.log()[before:] for line in (READ, *LOADED))
    return [error["details"] for error in caught.value.node_errors[node_id]["errors"]]


def failed(server: ComfyServer, prompt: Prompt, node_id: str = "optimise") -> str:
    """The sentence with which a node fails, within a second and with no model loaded by then."""
    before = len(server.log())
    start = server.work()
    with pytest.raises(ExecutionFailed) as caught:
        server.run(prompt)
    seconds = server.work() - start
    assert caught.value.node == node_id
    assert not {"content_prompt", "style_prompt"} & set(caught.value.result.executed), "a prompt was encoded first"
    assert not any(line in server.log()[before:] for line in LOADED)
    assert seconds < SECOND
    assert "\n" not in caught.value.text
    return caught.value.text


def bare(content: Concept, style: Concept, **settings: Any) -> Prompt:
    """The graph up to the optimise node, with empty latents: nothing needs to be encoded for them."""
    prompt = optimised(content, style, **settings)
    for concept in ("content", "style"):
        del prompt[f"{concept}_picture"]
        prompt[f"{concept}_latents"] = node("EmptyLatentImage", width=SIZE, height=SIZE, batch_size=1)
    return prompt


@pytest.fixture
def read_server(cold_server: ComfyServer, content: Concept) -> ComfyServer:
    """The same server with the checkpoint read from its file (the stock loader then loads the text encoder)."""
    graph = picture(BASE, content.prompt)
    cold_server.run(
        {
            "checkpoint": graph["checkpoint"],
            "loader": stock_loader(content.lora, BASE),
            "seen": node("PreviewAny", source=["loader", 0]),
        }
    )
    assert READ in cold_server.log()
    return cold_server


# Files


def missing(path: Path, good: Path) -> None:
    path.unlink(missing_ok=True)


def truncated(path: Path, good: Path) -> None:
    path.write_bytes(good.read_bytes()[:-1000])


def cut_in_the_header(path: Path, good: Path) -> None:
    path.write_bytes(good.read_bytes()[:64])


def empty(path: Path, good: Path) -> None:
    path.write_bytes(b"")


def renamed_pickle(path: Path, good: Path) -> None:
    path.write_bytes(pickle.dumps({"lora_unet_x.lora_up.weight": [0.0] * 1000}))


def renamed_zip(path: Path, good: Path) -> None:
    """What torch.save writes is a zip."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\0" * 1000)


def no_lora(path: Path, good: Path) -> None:
    save_file({"conv_in.weight": torch.ones(4, 4)}, path)


def with_number(number: float, path: Path, good: Path) -> None:
    tensors = load_file(good)
    name = next(name for name in tensors if "alpha" not in name)
    tensors[name].view(-1)[5] = number
    save_file(tensors, path)


def with_nan(path: Path, good: Path) -> None:
    with_number(float("nan"), path, good)


def with_infinity(path: Path, good: Path) -> None:
    with_number(float("-inf"), path, good)


@pytest.mark.parametrize("socket", ["content", "style"])
@pytest.mark.parametrize(
    ("spoil", "found", "remedy"),
    [
        (missing, "is missing", "put it into the loras folder"),
        (truncated, r"cut off: [\d,]+ bytes found, [\d,]+ expected", "download it again"),
        (cut_in_the_header, r"cut off \(64 bytes\)", "download it again"),
        (empty, r"cut off \(0 bytes\)", "download it again"),
        (renamed_pickle, "not a safetensors file", "choose a .safetensors LoRA"),
        (renamed_zip, "not a safetensors file", "choose a .safetensors LoRA"),
        (no_lora, "none of its 1 tensors has a LoRA name", "choose a LoRA file"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_broken_file(
    cold_server: ComfyServer,
    content: Concept,
    style: Concept,
    socket: str,
    spoil: Callable[[Path, Path], None],
    found: str,
    remedy: str,
) -> None:
    folder = cold_server.base / "models" / "loras"
    name = f"{spoil.__name__}.safetensors"
    spoil(folder / name, folder / content.lora)
    prompt = optimised(content, style)
    prompt["pair"]["inputs"][f"{socket}_lora"] = name
    for sentence in refused(cold_server, prompt, "pair"):
        assert f"{socket}_lora: '{name}'" in sentence
        assert re.search(found, sentence) and remedy in sentence
        assert "\n" not in sentence


def test_both_files_broken(cold_server: ComfyServer, content: Concept, style: Concept) -> None:
    prompt = optimised(replace(content, lora="no_subject.safetensors"), replace(style, lora="no_style.safetensors"))
    (sentence, _) = refused(cold_server, prompt, "pair")
    assert "content_lora: 'no_subject.safetensors' is missing" in sentence
    assert "style_lora: 'no_style.safetensors' is missing" in sentence


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", ".", "", "../checkpoints/" + CHECKPOINT])
def test_name_that_is_no_file_of_the_folder(
    cold_server: ComfyServer, content: Concept, style: Concept, name: str
) -> None:
    prompt = optimised(replace(content, lora=name), style)
    for sentence in refused(cold_server, prompt, "pair"):
        assert f"content_lora: '{name}' is missing; put it into the loras folder" in sentence


# Numbers


@pytest.mark.parametrize(
    ("setting", "value", "limit"),
    [
        ("steps", -1, "0"),
        ("steps", 10_001, "10000"),
        ("learning_rate", 0, "1e-08"),
        ("learning_rate", -0.01, "1e-08"),
        ("learning_rate", 11.0, "10.0"),
        ("learning_rate", "inf", "10.0"),
        ("similarity_lambda", -0.01, "0.0"),
        ("similarity_lambda", 1000.5, "1000.0"),
        ("batch_size", 0, "1"),
        ("batch_size", 65, "64"),
        ("seed", -1, "0"),
        ("seed", 2**64, str(2**64 - 1)),
    ],
)
def test_setting_out_of_range(
    cold_server: ComfyServer, content: Concept, style: Concept, setting: str, value: Any, limit: str
) -> None:
    prompt = optimised(content, style, **{setting: value})
    with pytest.raises(PromptRefused) as caught:
        cold_server.queue(prompt)
    sentence = caught.value.messages("optimise")
    assert sentence.endswith(f": {setting}")
    assert re.match(rf"Value \S+ (smaller than min|bigger than max) of {re.escape(limit)}: ", sentence)
    refused(cold_server, prompt, "optimise")


@pytest.mark.parametrize("socket", ["content_strength", "style_strength"])
def test_strength_out_of_range(cold_server: ComfyServer, content: Concept, style: Concept, socket: str) -> None:
    assert refused(cold_server, optimised(content, style, **{socket: 10.5}), "pair") == [socket]


@pytest.mark.parametrize("setting", ["learning_rate", "similarity_lambda"])
def test_setting_that_is_no_number(read_server: ComfyServer, content: Concept, style: Concept, setting: str) -> None:
    """The host's own check of the range lets NaN pass."""
    says = failed(read_server, bare(content, style, **{setting: "nan"}))
    assert says.startswith(f"{setting} is nan; expected a number from ")


# What only a file's numbers can tell


@pytest.mark.parametrize("socket", ["content", "style"])
@pytest.mark.parametrize("spoil", [with_nan, with_infinity])
def test_file_with_numbers_that_are_none(
    read_server: ComfyServer, content: Concept, style: Concept, socket: str, spoil: Callable[[Path, Path], None]
) -> None:
    folder = read_server.base / "models" / "loras"
    name = f"{spoil.__name__}.safetensors"
    spoil(folder / name, folder / content.lora)
    prompt = bare(content, style)
    prompt["pair"]["inputs"][f"{socket}_lora"] = name
    says = failed(read_server, prompt, "pair")
    assert says.startswith(f"'{name}' holds NaN or infinite numbers") and says.endswith("use another epoch or file")


# What only the model can tell


def lora_of(path: Path, shapes: dict[str, tuple[int, int]], rank: int = 4) -> Path:
    """A kohya file with these layers: name -> (out, in)."""
    tensors = {}
    for name, (rows, columns) in shapes.items():
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.ones(rows, rank)
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.ones(rank, columns)
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(float(rank))
    save_file(tensors, path)
    return path


def test_lora_of_sd15(read_server: ComfyServer, content: Concept, style: Concept, tmp_path: Path) -> None:
    """Its names of layers exist in SDXL too, with other widths: 768 numbers a token."""
    layers = {
        f"down_blocks_{block}_attentions_{n}_transformer_blocks_0_attn2_to_{part}": (width, 768)
        for block, width in ((0, 320), (1, 640), (2, 1280))
        for n in (0, 1)
        for part in "kv"
    }
    name = read_server.put_lora(lora_of(tmp_path / "sd15.safetensors", layers))
    for says in (
        failed(read_server, bare(replace(content, lora=name), style)),
        failed(read_server, bare(content, replace(style, lora=name))),
    ):
        assert says.startswith("'sd15.safetensors' was made for another model")
        assert re.search(r"weight of shape \(\d+, 768\), this model's is \(\d+, \d+\)", says)
        assert "choose a LoRA of the same model family" in says


def test_lora_with_no_layer_of_the_model(
    read_server: ComfyServer, content: Concept, style: Concept, tmp_path: Path
) -> None:
    layers = {f"double_blocks_{n}_img_attn_proj": (3072, 3072) for n in range(3)}
    name = read_server.put_lora(lora_of(tmp_path / "flux.safetensors", layers))
    says = failed(read_server, bare(content, replace(style, lora=name)))
    assert says.startswith("'flux.safetensors' has no layer that fits this model (")
    assert "'lora_unet_double_blocks_0_img_attn_proj" in says
    assert says.endswith("choose a LoRA of the same model family")


@pytest.mark.parametrize("socket", ["content_latents", "style_latents"])
def test_latents_of_another_model(read_server: ComfyServer, content: Concept, style: Concept, socket: str) -> None:
    prompt = bare(content, style)
    prompt[socket] = node("EmptySD3LatentImage", width=SIZE, height=SIZE, batch_size=1)
    says = failed(read_server, prompt)
    assert says.startswith(f"{socket} has shape (1, 16, 16, 16); this model's latents have 4 channels: ")
    assert "connect VAE Encode with this checkpoint's own VAE" in says
