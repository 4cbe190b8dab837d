"""Files that libraries write: our update is what the library itself makes of the weights, or the stock loader's."""

from __future__ import annotations

import library_table
import pytest
import twins
from libraries import by_diffusers
from library_table import FILES, TRANSFORMERS, WAYS, R


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The loras folder, with a folder in it for one LoRA."""
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    folder_paths.filename_list_cache.clear()
    (tmp_path / "one").mkdir()
    return tmp_path / "one"


def updates(pack, patcher, strength=1.0):
    """(Weight -> our update in float64, the file's notes), as the nodes read it."""
    bridge = pack.nodes.bridge
    source = bridge.lora.loras.load("one/subject.safetensors", strength)
    fitting = bridge.lora.fitting.fit_one(source, patcher.model)
    deltas = {
        key: (f.scale * (f.up.double() @ f.down.double().flatten(1))).reshape(patcher.model.state_dict()[key].shape)
        for key, f in fitting.factors.items()
    }
    return deltas, [*source.notes, *fitting.unused, *fitting.notes()]


def off(found, wanted) -> float:
    """The largest relative difference of a layer's update, in norm."""
    assert found.keys() == wanted.keys()
    return max(((found[k] - wanted[k]).norm() / wanted[k].norm()).item() for k in wanted)


def counted(pack, model, folder, wanted):
    """The file's line of the table: nothing that the stock loader reads is lost, nothing silently different."""
    row = library_table.row(pack, model.patcher, folder / "subject.safetensors", wanted)
    assert (row.lost, row.silent, row.refused) == (0, 0, ())
    assert row.ours == row.layers >= row.as_library == len(wanted)
    return row


@pytest.mark.parametrize("name", FILES)
def test_the_update_is_the_librarys(pack, folder, name):
    write, settings = FILES[name]
    model = twins.sdxl()
    wanted = model.placed(write(model, folder, **settings))
    assert len(wanted) > 10
    found, _ = updates(pack, model.patcher)
    assert off(found, wanted) < 1e-6
    counted(pack, model, folder, wanted)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", TRANSFORMERS)
def test_transformers_in_diffusers_names(pack, folder, family, way):
    make, layers = TRANSFORMERS[family]
    model = make()
    write, settings = WAYS[way]
    wanted = model.placed(write(model, folder, **R, **settings, target_modules=layers))
    assert len(wanted) >= len(layers)
    found, _ = updates(pack, model.patcher)
    assert off(found, wanted) < 1e-6
    counted(pack, model, folder, wanted)


def test_the_table_counts(pack):
    """One file of each writer: its sums, and what it says of a loader that reads nothing or something else."""
    names = [
        "lycoris, LoKr with Tucker core",
        "OneTrainer, DoRA on the output axis",
        "lycoris, DoRA on the output axis",
        "diffusers, DoRA of Flux (DoRA)",
        "peft, LoRA of SD 3 (peft)",
    ]
    rows = library_table.rows(pack, names)
    sums = library_table.total(rows.values())
    assert (sums.files, sums.layers, sums.ours, sums.stock) == (5, 590, 590, 462)
    assert (sums.as_library, sums.as_stock) == (427, 326)
    assert (sums.lost, sums.silent, sums.refused) == (0, 0, ())
    assert set(library_table.by_kind(rows)) == {
        "lycoris, LoKr", "OneTrainer, DoRA", "lycoris, DoRA", "diffusers, DoRA", "peft, LoRA"
    }  # fmt: skip


@pytest.mark.parametrize("fault", ["other numbers", "fewer layers", "refused"])
def test_the_table_tells(pack, folder, monkeypatch, fault):
    model = twins.flux()
    wanted = model.placed(by_diffusers(model, folder, r=4, lora_alpha=4, target_modules=["to_q", "ff.net.2"]))
    read = library_table.by_us

    def spoiled(*of):
        if fault == "refused":
            raise pack.ziplora_core.files.LoRAFileError("no such kind")
        deltas, notes = read(*of)
        key, delta = deltas.popitem()
        return deltas | ({key: delta * 2} if fault == "other numbers" else {}), notes

    path = folder / "subject.safetensors"
    right = library_table.row(pack, model.patcher, path, wanted)
    assert (right.layers, right.stock, right.ours, right.as_stock, right.as_library) == (len(wanted),) * 5
    monkeypatch.setattr(library_table, "by_us", spoiled)
    row = library_table.row(pack, model.patcher, path, wanted)
    assert (row.lost, row.silent, row.refused) == {
        "other numbers": (0, 1, ()), "fewer layers": (1, 0, ()), "refused": (len(wanted), 0, ("no such kind",))
    }[fault]  # fmt: skip
