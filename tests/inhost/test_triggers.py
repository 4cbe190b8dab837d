"""What LoRA files say of their use, in real loras folders: files by the real library, hostile ones, and the notes."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file

TENSORS = {
    "lora_unet_x.lora_up.weight": torch.zeros(4, 2),
    "lora_unet_x.lora_down.weight": torch.zeros(2, 4),
    "lora_unet_x.alpha": torch.tensor(2.0),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import folder_paths

    loras = tmp_path / "loras"
    loras.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(loras)], {".safetensors"}))
    folder_paths.filename_list_cache.clear()
    return loras


def write(folder: Path, name: str, metadata: dict[str, str] | None = None, **beside: Any) -> Path:
    """A LoRA by the real library. beside: its files by their ending, with __ for a point."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(TENSORS, path, metadata)
    for ending, said in beside.items():
        place = path.with_name(f"{path.stem}.{ending.replace('__', '.')}")
        place.write_text(said if isinstance(said, str) else json.dumps(said), encoding="utf-8")
    return path


def of_file(name: str):
    from ziplora_pack.nodes.bridge.lora import triggers

    return triggers.of_file(name)


# As each trainer fills a header, cut down to what can tell something.
KOHYA = {
    "ss_tag_frequency": json.dumps({"10_sks dog": {"sks dog": 6}}),
    "ss_dataset_dirs": json.dumps({"10_sks dog": {"n_repeats": 10, "img_count": 6}}),
    "ss_reg_dataset_dirs": "{}",
    "ss_base_model_version": "sdxl_base_v1-0",
    "ss_sd_model_name": "sd_xl_base_1.0.safetensors",
    "modelspec.sai_model_spec": "1.0.1",
    "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
    "modelspec.title": "dog",
}
ONE_TRAINER = {
    "ot_branch": "master",
    "ot_revision": "abc",
    "ot_config": json.dumps({"concepts": [{"name": "x", "path": "/somewhere"}]}),
    "ss_base_model_version": "sdxl_",
    "modelspec.sai_model_spec": "1.0.0",
    "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
    "modelspec.trigger_phrase": "mypetcat",
}
AI_TOOLKIT = {
    "ss_base_model_version": "flux",
    "ss_output_name": "p3r5on_v1",
    "ss_tag_frequency": json.dumps({"1_p3r5on": {"p3r5on": 1}}),
    "software": json.dumps({"name": "ai-toolkit"}),
    "training_info": json.dumps({"step": 2000}),
    "name": "p3r5on_v1",
}
DIFFUSERS = {"format": "pt", "lora_adapter_metadata": json.dumps({"transformer.r": 16})}


@pytest.mark.parametrize(
    ("metadata", "prompt", "source", "family"),
    [
        (KOHYA, "sks dog", "ss_tag_frequency", "SDXL"),
        (ONE_TRAINER, "mypetcat", "modelspec.trigger_phrase", "SDXL"),
        (AI_TOOLKIT, "p3r5on", "ss_tag_frequency", "Flux"),
        (DIFFUSERS, "", "", ""),
        (None, "", "", ""),
    ],
    ids=["kohya", "OneTrainer", "ai-toolkit", "diffusers", "nothing"],
)
def test_headers_of_trainers(folder: Path, metadata: dict, prompt: str, source: str, family: str) -> None:
    write(folder, "a.safetensors", metadata)
    found = of_file("a.safetensors")
    assert (found.prompt, found.source, found.family, found.notes) == (prompt, source, family, ())
    assert found.listed and found.thumbnail is None


def test_files_beside_in_a_subfolder_with_points_in_the_name(folder: Path) -> None:
    write(
        folder,
        "sub/my.dog v1.safetensors",
        KOHYA,
        civitai__info={"trainedWords": ["site words"], "baseModel": "Pony"},
        json={"activation text": "mine", "preferred weight": 0.7, "sd version": "SDXL"},
    )
    Image.new("RGB", (40, 30)).save(folder / "sub" / "my.dog v1.preview.png")
    write(folder, "sub/my.safetensors", txt="another LoRA's")
    found = of_file(os.path.join("sub", "my.dog v1.safetensors"))
    assert (found.prompt, found.source) == ("mine", "json")
    assert (found.base_model, found.family, found.line, found.strength) == ("Pony", "SDXL", "Pony", 0.7)
    assert found.thumbnail == str(folder / "sub" / "my.dog v1.preview.png")
    (folder / "sub" / "my.dog v1.json").unlink()
    assert of_file(os.path.join("sub", "my.dog v1.safetensors")).prompt == "site words"


def test_names_behind_the_whole_name(folder: Path) -> None:
    write(folder, "a.safetensors")
    (folder / "a.safetensors.rgthree-info.json").write_text('{"trainedWords": [{"word": "zwx"}]}', encoding="utf-8")
    assert of_file("a.safetensors").prompt == "zwx"


def test_a_model_card_counts_where_the_lora_has_a_folder_to_itself(folder: Path) -> None:
    card = "---\nbase_model: stabilityai/stable-diffusion-xl-base-1.0\ninstance_prompt: a photo of sks dog\n---\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
    write(folder, "alone.safetensors", DIFFUSERS)
    write(folder, "repo/pytorch_lora_weights.safetensors", DIFFUSERS)
    (folder / "repo" / "README.md").write_text(card, encoding="utf-8")
    assert of_file("alone.safetensors").prompt == ""  # in the loras folder itself it is nobody's
    name = os.path.join("repo", "pytorch_lora_weights.safetensors")
    assert (of_file(name).prompt, of_file(name).source) == ("a photo of sks dog", "README.md")
    write(folder, "repo/second.safetensors", DIFFUSERS)
    assert of_file(name).prompt == ""


def test_trained_concepts_say_their_prompt(folder: Path) -> None:
    write(folder, "mine.safetensors", {"ziplora_settings": "…", "ziplora_prompt": "a sks dog"})
    assert of_file("mine.safetensors").prompt == "a sks dog"


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/passwd", "..\\secret.safetensors", "sub/../a.safetensors", "./a.safetensors"]
    + ["a.safetensors\x00.txt", "a", "", ".", "a.safetensors/", "x" * 10_000, None, 3, ["a.safetensors"]],
)
def test_no_name_leads_out_of_the_loras_folders(folder: Path, name: Any) -> None:
    write(folder.parent, "secret.safetensors", {"modelspec.trigger_phrase": "secret"})
    write(folder, "a.safetensors", {"modelspec.trigger_phrase": "a"})
    (folder / "sub").mkdir()
    found = of_file(name)
    assert not found.listed and found.prompt == "" and found.thumbnail is None
    assert found.notes and len(found.notes[0]) < 300


def test_links_out_of_the_folder_are_not_followed(folder: Path) -> None:
    write(folder, "a.safetensors")
    secret = folder.parent / "secret.txt"
    secret.write_text("secret", encoding="utf-8")
    Image.new("RGB", (9, 9)).save(folder.parent / "secret.png")
    (folder / "a.txt").symlink_to(secret)
    (folder / "a.png").symlink_to(folder.parent / "secret.png")
    (folder / "a.civitai.info").mkdir()
    os.mkfifo(folder / "a.json")  # reading it would wait for ever
    found = of_file("a.safetensors")
    assert found.prompt == "" and found.thumbnail is None
    assert len(found.notes) == 3 and not any(str(folder.parent) in note for note in found.notes)
    # A folder that is linked as a whole is the user's own arrangement.
    elsewhere = folder.parent / "elsewhere"
    write(elsewhere, "b.safetensors", txt="b words")
    (folder / "linked").symlink_to(elsewhere)
    assert of_file(os.path.join("linked", "b.safetensors")).prompt == "b words"


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        ("civitai.info", b"{"),
        ("civitai.info", b"[1, 2]"),
        ("civitai.info", b"\xff\xfe\x00"),
        ("metadata.json", b"[" * 200_000),
        ("json", b'{"activation text": "x", "pad": "' + b"x" * (5 * 2**20) + b'"}'),
        ("txt", b"word " * 400),
        ("txt", b"x" * 100_000),
        ("txt", b"My first LoRA. Do not sell it."),
        ("txt", b"tag, " * 70),
    ],
    ids=["cut off", "a list", "no text", "deep", "large", "long", "too large", "sentences", "long list"],
)
def test_broken_files_beside_are_passed_over_with_a_note(folder: Path, ending: str, said: bytes) -> None:
    write(folder, "a.safetensors", {"modelspec.trigger_phrase": "phrase"})
    (folder / f"a.{ending}").write_bytes(said)
    found = of_file("a.safetensors")
    assert found.prompt == "phrase"
    (note,) = found.notes
    assert f"a.{ending}" in note and "ignored" in note


def raw(path: Path, header: bytes, length: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b'{"__metadata__": []}',
        b'{"__metadata__": {"modelspec.trigger_phrase": 3}}',
        b'{"__metadata__": {"a": {"b": "c"}}}',
        b'{"a":' * 100_000,
        b"\xff" * 100,
    ],
)
def test_broken_headers_are_passed_over_with_a_note_and_files_beside_still_count(folder: Path, header: bytes) -> None:
    raw(folder / "a.safetensors", header)
    (folder / "a.txt").write_text("words", encoding="utf-8")
    found = of_file("a.safetensors")
    assert found.prompt == "words"
    (note,) = found.notes
    assert "a.safetensors" in note


def test_huge_headers_are_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huge = folder / "a.safetensors"
    raw(huge, b"{", 90 * 2**20)
    with open(huge, "ab") as file:
        file.truncate(95 * 2**20)  # sparse
    from ziplora_pack.nodes.bridge.lora import triggers

    with monkeypatch.context() as patched:
        patched.setattr(triggers, "read_metadata", lambda path: pytest.fail("it was read"))
        (note,) = of_file("a.safetensors").notes
    assert "header" in note
    raw(huge, b"{}", 2**63)  # more than the file has: the reader's own sentence
    assert "not a safetensors file" in of_file("a.safetensors").notes[0]


def test_no_tensor_is_read(folder: Path) -> None:
    """Of a file as large as a LoRA only the header is: counted by the kernel."""
    if not Path("/proc/self/io").exists():
        pytest.skip("what a process reads is told by Linux's /proc")
    save_file({**TENSORS, "lora_unet_y.lora_up.weight": torch.zeros(2**22)}, folder / "a.safetensors", KOHYA)
    of_file("a.safetensors")

    def read() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(dict(line.split(": ") for line in lines)["rchar"])

    before = read()
    assert of_file("a.safetensors").prompt == "sks dog"
    assert read() - before < 100_000


# Notes where a file names another base model


@pytest.fixture(scope="module")
def sdxl():
    return tiny.tiny_patcher()


def notes(folder: Path, patcher, monkeypatch: pytest.MonkeyPatch, content: dict, checkpoint: str = "") -> list[str]:
    """Of a pair whose content file says something; checkpoint: the one that the graph loads."""
    from ziplora_pack.nodes.bridge.lora import base_models, fitting, loras

    for seed, (name, said) in enumerate({"dog": content, "oil": {"ss_base_model_version": "sdxl_base_v1-0"}}.items()):
        tensors = tiny.full_size.attention_lora(patcher.model, 2, seed, torch.float32)
        save_file(tensors, folder / f"{name}.safetensors", said)
    monkeypatch.setattr(base_models, "running_checkpoints", lambda: [checkpoint] if checkpoint else [])
    sources = loras.load_pair("dog.safetensors", "oil.safetensors", 1.0, 1.0)
    return [note for note in fitting.fit(sources, patcher.model).notes if "says that it was made for" in note]


def test_another_family_that_fits_all_the_same_is_a_note(folder: Path, sdxl, monkeypatch) -> None:
    (note,) = notes(folder, sdxl, monkeypatch, {"ss_base_model_version": "sd_v1"})
    assert "dog.safetensors" in note and "SD 1.5" in note and "SDXL" in note


def test_lines_of_sdxl_are_told_apart_by_the_checkpoints_name(folder: Path, sdxl, monkeypatch) -> None:
    pony = {"ss_base_model_version": "sdxl_base_v1-0", "ss_sd_model_name": "ponyDiffusionV6XL.safetensors"}
    (note,) = notes(folder, sdxl, monkeypatch, pony, "sd_xl_base_1.0.safetensors")
    assert "Pony" in note and "sd_xl_base_1.0.safetensors" in note
    assert note.endswith("best is a checkpoint of the same line, for every LoRA"), "there may be one LoRA, or five"
    assert notes(folder, sdxl, monkeypatch, pony, "models/ponyRealism_v22.safetensors") == []
    assert len(notes(folder, sdxl, monkeypatch, pony)) == 1
    assert notes(folder, sdxl, monkeypatch, KOHYA, "sd_xl_base_1.0.safetensors") == []
    assert notes(folder, sdxl, monkeypatch, {}, "ponyRealism_v22.safetensors") == []


def test_our_own_exports_name_the_family_of_their_model() -> None:
    import families as tested
    from ziplora_pack.nodes.bridge import export
    from ziplora_pack.nodes.bridge.lora import base_models
    from ziplora_pack.ziplora_core import families

    for family in tested.FAMILIES.values():
        model = family.model()
        host = type(model.model_config).__name__
        ours = base_models.model_family(model)
        assert ours, host
        assert families.family(export._KOHYA_BASES.get(host, host)) == ours
        assert families.family(export._ARCHITECTURES.get(host, host)) == ours


def test_the_running_graphs_checkpoint_is_found_in_the_hosts_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import SimpleNamespace

    from execution import PromptQueue
    from ziplora_pack.nodes.bridge.lora import base_models

    queue = PromptQueue(SimpleNamespace(queue_updated=lambda: None))
    loader = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "a.safetensors"}}
    other = {"class_type": "UNETLoader", "inputs": {"unet_name": ["1", 0]}}
    queue.put((0, "id", {"1": loader, "2": other}, {}, ["1"], {}))
    host = SimpleNamespace(PromptServer=SimpleNamespace(instance=SimpleNamespace(prompt_queue=queue)))
    monkeypatch.setitem(sys.modules, "server", host)
    assert base_models.running_checkpoints() == []
    queue.get()
    assert base_models.running_checkpoints() == ["a.safetensors"]
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace())
    assert base_models.running_checkpoints() == []


def test_thumbnails_are_drawn_anew_and_nothing_else_is_sent(tmp_path: Path) -> None:
    import io

    from ziplora_pack.nodes.bridge.lora import routes

    colors = np.zeros((600, 900, 3), np.uint8)
    colors[:, :450, 0] = 255
    for kind in ("png", "jpeg", "webp"):
        path = tmp_path / f"a.{kind}"
        Image.fromarray(colors).save(path)
        drawn = Image.open(io.BytesIO(routes.thumbnail(str(path))))
        assert drawn.format == "JPEG" and drawn.size == (256, 171)
        assert np.abs(np.asarray(drawn)[80, [20, 230]].astype(int) - [[255, 0, 0], [0, 0, 0]]).max() < 12
    broken = tmp_path / "b.png"
    for said in (b"", b"secret", (tmp_path / "a.png").read_bytes()[:200], b"<svg xmlns='x'></svg>"):
        broken.write_bytes(said)
        assert routes.thumbnail(str(broken)) is None
    Image.new("1", (9_000, 9_000)).save(broken)  # a small file that would take much memory
    assert routes.thumbnail(str(broken)) is None
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(broken)
    assert routes.thumbnail(str(broken)) is not None
    assert routes.thumbnail(str(tmp_path / "nowhere.png")) is None
