"""Training beside other programs that write, and on disks that refuse: what was learned is kept, and so is theirs."""

from __future__ import annotations

from pathlib import Path

import pytest
import test_training
import test_unzip
import tiny
from safetensors import safe_open
from safetensors.torch import save_file
from test_training import output, patcher  # noqa: F401


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.fixture
def another(pack, output, monkeypatch):  # noqa: F811
    """Another program, which reserves nothing, writes under these names as soon as a training has begun."""
    run = pack.nodes.bridge.training.run

    def begun(*names):
        def working(*args, **given):
            for name in names:
                (output / name).write_bytes(b"another's")
            return run(*args, **given)

        monkeypatch.setattr(pack.nodes.bridge.training, "run", working)

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
    assert [source.name for source in done.pair.by_concept().values()] == names
    again = test_unzip.take_apart(pack, patcher, test_unzip.task(pack, steps=2, go_on_from=names[0]))
    assert "steps 2 to 2" in again.report


def exported(pack, patcher):  # noqa: F811
    zipped = pack.nodes.bridge.direct.merge(patcher, tiny.sources(pack, patcher.model), "sum")
    return pack.nodes.bridge.export.export_file(zipped, "made", 0, "fp16", "kohya")[2]


def saved(pack, patcher):  # noqa: F811
    """Of two files, as it is bound to them."""
    loras = pack.nodes.bridge.loras
    for name, source in tiny.sources(pack, patcher.model).by_concept().items():
        save_file({k: t.clone() for k, t in source.tensors.items()}, folder() / "loras" / f"{name}.safetensors")
    sources = loras.load_pair("content.safetensors", "style.safetensors", 1.0, 1.0)
    return "ziplora/" + pack.nodes.bridge.saved.save(pack.nodes.bridge.direct.merge(patcher, sources, "sum"), "made")


def told(pack, patcher):  # noqa: F811
    return pack.nodes.bridge.paths.write_output("made", ".json", "text")


def folder() -> Path:
    import folder_paths

    return Path(folder_paths.output_directory)


@pytest.mark.parametrize("write", [exported, saved, told])
def test_what_is_written_once_leaves_a_file_that_came_meanwhile(pack, patcher, output, monkeypatch, write):  # noqa: F811
    (output / "loras").mkdir()
    paths, taken = pack.nodes.bridge.paths, []
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
