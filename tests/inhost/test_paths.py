"""Numbered names in the host's folders: each is one writer's alone, and is free again where nothing was written."""

from __future__ import annotations

import multiprocessing
import os

import pytest


@pytest.fixture
def output(tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return tmp_path


def write_sixty(paths, text, ready):
    ready.wait()
    for _ in range(60):
        paths.write_output("sheets/blind", ".json", text)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_two_processes_that_write_at_once_lose_no_file(pack, output):
    fork = multiprocessing.get_context("fork")
    ready = fork.Barrier(2)
    writers = [fork.Process(target=write_sixty, args=(pack.nodes.bridge.disk.paths, t, ready)) for t in ("one", "two")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    texts = [path.read_text() for path in (output / "sheets").iterdir()]
    assert sorted(texts) == ["one"] * 60 + ["two"] * 60


def test_two_trainings_at_once_have_two_files(pack, output):
    files = [pack.nodes.bridge.training.lora_file.File(None, "loras/concept", {}) for _ in range(2)]
    assert [file.name for file in files] == ["loras/concept_00001_.safetensors", "loras/concept_00002_.safetensors"]


@pytest.mark.parametrize("ends", [None, ValueError("no"), KeyboardInterrupt()])
def test_a_name_that_was_not_written_to_is_free_again(pack, output, ends):
    paths, kept = pack.nodes.bridge.disk.paths, []

    @paths.names_given_back()
    def work():
        kept.extend(paths.reserve("mine", str(output), ".txt") for _ in range(3))
        assert len(set(kept)) == 3 and not any(os.path.exists(path) for path in kept)
        with paths.atomic_write(kept[1]) as file:
            file.write(b"written")
        with open(others, "w"):  # another program's, which takes the name: empty as yet
            pass
        os.replace(others, kept[2])
        if ends is not None:
            raise ends

    before, others = output / "before.txt", output / "others.txt"
    with open(before, "w"):
        pass
    if ends is None:
        work()
    else:
        with pytest.raises(type(ends)):
            work()
    left = {path.name for path in output.iterdir()}
    assert left == {"before.txt", *map(os.path.basename, kept[1:])}


def test_a_training_that_fails_leaves_no_empty_file(pack, output):
    """Here in its first work after its file's name is chosen: there is no text encoder."""
    import tiny
    import torch

    training = pack.nodes.bridge.training
    task = training.concept.Task(
        [training.pictures.TrainingImages([torch.full((1, 16, 16, 3), 0.5)], ["a sks dog"])],
        pack.ziplora_core.training.Settings(steps=1),
        "loras/concept",
        resolution=64,
    )
    with pytest.raises(AttributeError):
        training.concept.train_concept(tiny.tiny_patcher(), None, None, task)
    assert list((output / "loras").iterdir()) == []


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\n", "\x1b"])
def test_a_name_is_one_line(pack, output, character):
    with pytest.raises(ValueError, match="holds characters that no file name has"):
        pack.nodes.bridge.disk.paths.reserve(f"a{character}b", str(output), ".txt")
