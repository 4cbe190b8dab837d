"""Training beside other programs that write, and on disks that refuse: what was learned is kept, and so is theirs."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import test_training
import test_unzip
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_training import output, patcher  # noqa: F401


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.fixture
def another(pack, output, monkeypatch):  # noqa: F811
    """Another program, which reserves nothing, writes under these names as soon as a training has begun."""
    run = pack.nodes.bridge.training.loading.with_denoiser

    def begun(*names):
        def working(*args, **given):
            for name in names:
                (output / name).write_bytes(b"another's")
            return run(*args, **given)

        monkeypatch.setattr(pack.nodes.bridge.training.loading, "with_denoiser", working)

    return begun


def test_a_training_leaves_a_file_that_came_meanwhile(pack, patcher, output, another):  # noqa: F811
    another("loras/tiny_00001_.safetensors")
    done = test_training.train(pack, patcher, test_training.task(pack, steps=3, save_every=1))
    assert done.file == "loras/tiny_00002_.safetensors" and f"written: {done.file}" in done.report
    assert (output / "loras/tiny_00001_.safetensors").read_bytes() == b"another's"
    assert metadata(output / done.file)["ss_steps"] == "3"
    assert len(list((output / "loras").iterdir())) == 2


@pytest.mark.parametrize("taken", ["content", "style"])
def test_both_files_of_a_picture_name_each_other_as_they_are_called(pack, patcher, output, another, taken):  # noqa: F811
    another(f"loras/apart_{taken}_00001_.safetensors")
    done = test_unzip.take_apart(pack, patcher, test_unzip.task(pack, steps=1))
    names = [f"apart_{c}_0000{2 if c == taken else 1}_.safetensors" for c in ("content", "style")]
    assert done.files == [f"loras/{name}" for name in names]
    assert [metadata(output / "loras" / name)["ziplora_other_half"] for name in names] == names[::-1]
    assert [source.name for source in done.pair.by_concept.values()] == names
    again = test_unzip.take_apart(pack, patcher, test_unzip.task(pack, steps=2, go_on_from=names[0]))
    assert "steps 2 to 2" in again.report


@pytest.fixture
def refused(pack, monkeypatch):
    """Writes of a training that the disk refuses: a function of the write's number, from 1, and its steps."""
    lora_file, calls = pack.nodes.bridge.training.lora_file, []
    real = lora_file.write_tensors

    def write(path, tensors, about):
        calls.append(int(about["ss_steps"]))
        if write.refuses(len(calls), calls[-1]):
            with writing.atomic_write(path) as file:
                file.write(b"half")
                raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, tensors, about)

    writing = pack.ziplora_core.writing
    write.calls = calls
    monkeypatch.setattr(lora_file, "write_tensors", write)
    return write


def test_a_write_on_the_way_that_fails_ends_no_training(pack, patcher, output, refused, caplog):  # noqa: F811
    refused.refuses = lambda number, steps: number == 1
    done = test_training.train(pack, patcher, test_training.task(pack, steps=4, save_every=2))
    assert refused.calls == [2, 4] and f"written: {done.file}" in done.report
    assert metadata(output / done.file)["ss_steps"] == "4"
    assert "learned in 2 steps could not be written" in caplog.text and "No space left on device" in caplog.text


def test_the_last_write_is_tried_again(pack, patcher, output, refused):  # noqa: F811
    refused.refuses = lambda number, steps: number == 1
    done = test_training.train(pack, patcher, test_training.task(pack, steps=2))
    assert refused.calls == [2, 2] and f"written: {done.file}" in done.report
    assert metadata(output / done.file)["ss_steps"] == "2"


@pytest.mark.parametrize("on_the_way", [0, 1])
def test_a_full_disk_loses_no_training(pack, patcher, output, refused, caplog, on_the_way):  # noqa: F811
    """The LoRA that is returned is the one that a disk with room would have."""
    train, task = test_training.train, test_training.task
    refused.refuses = lambda number, steps: steps == 2
    done = train(pack, patcher, task(pack, steps=2, save_every=on_the_way, prefix="loras/full"))
    refused.refuses = lambda number, steps: False
    expected = train(pack, patcher, task(pack, steps=2)).lora_model
    assert done.lora_model.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in done.lora_model.items())
    assert "loras/full_00001_.safetensors could not be written: No space left on device" in done.report
    assert "written: loras/full" not in done.report and "learned in 2 steps could not be written" in caplog.text
    left = [path for path in (output / "loras").iterdir() if "full" in path.name]
    if on_the_way:
        assert done.file == "loras/full_00001_.safetensors" and "(the file has 1 steps)" in done.report
        assert [metadata(path)["ss_steps"] for path in left] == ["1"]
    else:
        assert done.file == "" and left == []


@pytest.mark.parametrize("full", [("content",), ("content", "style")])
def test_a_full_disk_loses_neither_half_of_a_picture(pack, patcher, output, refused, monkeypatch, full):  # noqa: F811
    """A half that is on disk with fewer steps is not taken for the one that was learned."""
    real = pack.nodes.bridge.training.lora_file.File.write
    struck = []

    def write(self, factors, steps):
        struck[:] = [self.about["ziplora_half"]]
        return real(self, factors, steps)

    monkeypatch.setattr(pack.nodes.bridge.training.lora_file.File, "write", write)
    refused.refuses = lambda number, steps: steps == 2 and struck[0] in full
    done = test_unzip.take_apart(pack, patcher, test_unzip.task(pack, steps=2, save_every=1))
    refused.refuses = lambda number, steps: False
    expected = test_unzip.take_apart(pack, patcher, test_unzip.task(pack, steps=2, prefix="loras/room"))
    for concept, source in done.pair.by_concept.items():
        theirs, name = expected.pair.by_concept[concept].tensors, f"apart_{concept}_00001_.safetensors"
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in source.tensors.items())
        assert (source.version is None) == (concept in full)
        assert metadata(output / "loras" / name)["ss_steps"] == ("1" if concept in full else "2")
        assert (f"loras/{name} could not be written: No space" in done.report) == (concept in full)
        assert (f"written: loras/{name}" in done.report) == (concept not in full)


def test_the_node_shows_no_file_where_there_is_none(pack, monkeypatch):
    node = next(node for node in pack.nodes.NODES if node.__name__ == "TrainConceptLoRA")
    training = pack.nodes.bridge.training.concept
    for file, files in (
        ("", ()),
        ("a/b.safetensors", ({"filename": "b.safetensors", "subfolder": "a", "type": "output"},)),
    ):
        monkeypatch.setattr(training, "train_concept", lambda *given, file=file: training.Trained({}, {}, "", file))
        given = dict.fromkeys(("model", "clip", "vae"), [object()])
        lists = {"prompt": ["a"], "layers": ["attention"], "filename_prefix": ["loras/a"]}
        numbers = {
            "steps": [1],
            "learning_rate": [1e-3],
            "rank": [2],
            "batch_size": [1],
            "resolution": [64],
            "seed": [0],
        }
        shown = node.execute([test_training.pictures()], **given, **lists, **numbers)
        assert shown.ui == {"files": files}


def exported(pack, patcher):  # noqa: F811
    zipped = pack.nodes.bridge.direct.merge(patcher, tiny.sources(pack, patcher.model), "sum")
    return pack.nodes.bridge.export.export_file(zipped, "made", 0, "fp16", "kohya")[2]


def saved(pack, patcher):  # noqa: F811
    """Of two files, as it is bound to them."""
    loras = pack.nodes.bridge.lora.loras
    for name, source in tiny.sources(pack, patcher.model).by_concept.items():
        save_file({k: t.clone() for k, t in source.tensors.items()}, folder() / "loras" / f"{name}.safetensors")
    sources = loras.load_pair("content.safetensors", "style.safetensors", 1.0, 1.0)
    return "ziplora/" + pack.nodes.bridge.saved.save(pack.nodes.bridge.direct.merge(patcher, sources, "sum"), "made")


def told(pack, patcher):  # noqa: F811
    return pack.nodes.bridge.disk.paths.write_output("made", ".json", "text")


def folder() -> Path:
    import folder_paths

    return Path(folder_paths.output_directory)


@pytest.mark.parametrize("write", [exported, saved, told])
def test_what_is_written_once_leaves_a_file_that_came_meanwhile(pack, patcher, output, monkeypatch, write):  # noqa: F811
    (output / "loras").mkdir()
    paths, taken = pack.nodes.bridge.disk.paths, []
    reserve = paths.reserve

    def crossed(*given):
        path = reserve(*given)
        taken.append(Path(path))
        taken[0].write_bytes(b"another's")
        return path

    monkeypatch.setattr(paths, "reserve", crossed)
    name = write(pack, patcher)
    assert "_00002_." in name and (output / name).stat().st_size
    assert taken[0].read_bytes() == b"another's" and taken[0].parent == (output / name).parent
