"""Saved coefficients: the same pair again, from files of any name, or a refusal that names the file."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import replace

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_apply import largest_difference, random_coefficients, weights
from test_hashes import later_than

from devhost.large_files import sparse_lora


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A loras folder with two files and an output folder, as the host's own; and the nodes' execute by id."""
    import folder_paths

    for name in ("loras", "output/ziplora", "user"):
        (tmp_path / name).mkdir(parents=True)
    registered = dict(folder_paths.folder_names_and_paths)
    registered["loras"] = ([str(tmp_path / "loras")], {".safetensors"})
    registered["ziplora"] = ([str(tmp_path / "output" / "ziplora")], {".safetensors"})
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", registered)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path / "user"))
    return tmp_path


@pytest.fixture
def pair(pack, folders):
    """A pair from two files, with wild coefficients and both dials turned."""
    patcher = tiny.tiny_patcher()
    for seed, name in enumerate(("subject", "style")):
        lora = tiny.full_size.attention_lora(patcher.model, 4 + seed, seed, torch.float32)
        save_file({k: t.clone() for k, t in lora.items()}, folders / "loras" / f"{name}.safetensors")
    lora = pack.nodes.bridge.lora
    sources = lora.loras.load_pair("subject.safetensors", "style.safetensors", 0.7, 1.1)
    fitted = pack.nodes.bridge.lora.fitting.fit(sources, patcher.model)
    coefficients = random_coefficients(pack, fitted.loras).scaled(content=0.5, style=1.5)
    settings = {"steps": 3, "solver": "gradient"}
    return patcher, lora.zipped.ZippedLoRA(
        sources, fitted, coefficients, tiny.of_two(0.5, 1.5), "what it did", settings=settings
    )


def rename(folders, old: str, new: str) -> None:
    (folders / "loras" / old).rename(folders / "loras" / new)
    os.utime(folders / "loras", (1e9, 1e9))  # its listing is cached by the folder's time


@pytest.mark.parametrize("renamed", [False, True])
def test_loaded_is_applied_bit_for_bit_as_before(pack, folders, pair, renamed):
    patcher, zipped = pair
    saved, apply = pack.nodes.bridge.saved, pack.nodes.bridge.apply.apply
    before = weights(apply(patcher, None, zipped, 0.8)[0])
    name = saved.save(zipped, "mine")
    if renamed:
        rename(folders, "subject.safetensors", "other name.safetensors")
        rename(folders, "style.safetensors", "subject.safetensors")  # even another's name
    assert saved.check(name) is None
    again = saved.load(patcher, name)
    assert largest_difference(weights(apply(patcher, None, again, 0.8)[0]), before) == 0.0
    for side in ("content", "style"):
        mine, theirs = zipped.coefficients[side], again.coefficients[side]
        assert mine.keys() == theirs.keys() and all(torch.equal(m, theirs[k]) for k, m in mine.items())
    kept = ("dials", "report", "method", "settings")
    assert all(getattr(again, k) == getattr(zipped, k) for k in kept)
    assert saved.save(again, "mine") != name, "a second save took the first one's file"


@pytest.mark.parametrize(
    "method", ["sum", "shared columns", "NP-LoRA", "TIES", "DARE", "KnOTS", "TSV-Merge", "SVD", "UnZipLoRA blocks"]
)
def test_direct_merges_are_saved_too(pack, folders, pair, method):
    patcher, zipped = pair
    merged = pack.nodes.bridge.direct.merge(patcher, zipped.sources, method)
    saved, apply = pack.nodes.bridge.saved, pack.nodes.bridge.apply.apply
    again = saved.load(patcher, saved.save(merged, "direct"))
    ours, theirs = (weights(apply(patcher, None, z, 1.0)[0]) for z in (merged, again))
    assert largest_difference(ours, theirs) == 0.0 and largest_difference(ours, weights(patcher)) > 0.01


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["subject.safetensors", "style.safetensors"])
def test_a_changed_or_missing_lora_is_refused_by_name(pack, folders, pair, name):
    patcher, zipped = pair
    saved = pack.nodes.bridge.saved
    file = saved.save(zipped, "mine")
    flip_a_byte(folders / "loras" / name)
    for refused in (lambda: saved.load(patcher, file), lambda: saved.save(zipped, "mine")):
        with pytest.raises(ValueError, match=f"'{name}'.*has changed since"):
            refused()
    rename(folders, name, "../gone.safetensors")
    with pytest.raises(ValueError, match=f"'{name}'.*is missing: it is in no loras folder"):
        saved.load(patcher, file)


def test_another_models_file_is_refused(pack, folders, pair):
    patcher, zipped = pair
    saved = pack.nodes.bridge.saved
    own = zipped.coefficients.by_concept
    layers = list(own["style"])
    short = {k: m[:-1] if k == layers[3] else m for k, m in zipped.coefficients["style"].items()}
    for broken, says in (
        (type(zipped.coefficients)({**own, "style": short}), f"has .* style coefficients for layer '{layers[3]}'"),
        (
            type(zipped.coefficients)({**own, "content": {"nowhere": torch.ones(3)}}),
            "has 0 content coefficients for layer",
        ),
    ):
        with pytest.raises(ValueError, match=says):
            saved.load(patcher, saved.save(replace(zipped, coefficients=broken), "mine"))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "cut off"),
        (lambda path: path.write_bytes(b"no safetensors at all"), "not a safetensors file"),
        (lambda path: save_file(load_file(path), path), "is no zipped pair"),
        (lambda path: save_file(load_file(path), path, {"ziplora": "{"}), "broken metadata"),
        (lambda path: save_file(load_file(path), path, {"ziplora": '{"format": "ziplora 5"}'}), "update the pack"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
def test_broken_files_are_refused_before_a_model_is_loaded(pack, folders, pair, spoil, says):
    saved = pack.nodes.bridge.saved
    name = saved.save(pair[1], "mine")
    spoil(folders / "output" / "ziplora" / name)
    assert says in saved.check(name) and name in saved.check(name)
    assert pack.nodes.LoadZippedLoRA.validate_inputs(name) == saved.check(name)
    with pytest.raises(ValueError, match=says):
        saved.load(pair[0], name)


def test_a_header_that_lies_is_refused_by_name(pack, folders, pair):
    """A dtype that does not fit its bytes passes the look at the header and fails in safetensors itself."""
    saved = pack.nodes.bridge.saved
    name = saved.save(pair[1], "mine")
    path = folders / "output" / "ziplora" / name
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F64"', 1))
    for refused in (lambda: saved.load(pair[0], name), lambda: pack.ziplora_core.saved.read_about(path)):
        with pytest.raises(pack.ziplora_core.files.LoRAFileError, match=f"'{name}' cannot be read"):
            refused()


def test_nan_in_the_file_is_refused(pack, folders, pair):
    saved = pack.nodes.bridge.saved
    name = saved.save(pair[1], "mine")
    path = folders / "output" / "ziplora" / name
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    first = next(iter(tensors))
    tensors[first][0] = float("nan")
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="no usable coefficients at"):
        saved.load(pair[0], name)


def test_a_failed_write_leaves_nothing(pack, folders, pair, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        pack.nodes.bridge.saved.save(pair[1], "mine")
    assert list((folders / "output" / "ziplora").iterdir()) == []


def test_the_file_says_how_it_was_made(pack, folders, pair):
    name = pack.nodes.bridge.saved.save(pair[1], "mine")
    with safe_open(str(folders / "output" / "ziplora" / name), framework="pt") as file:
        about = json.loads(file.metadata()["ziplora"])
    assert about["content"]["name"] == "subject.safetensors" and len(about["style"]["sha256"]) == 64
    assert about["settings"] == {"steps": 3, "solver": "gradient"} and about["versions"]["ziplora"]
    assert about["content"]["strength"] == 0.7 and about["dials"] == [0.5, 1.5]


def test_full_size_pair_is_saved_in_six_megabytes(pack, folders):
    model = tiny.full_size.sdxl_model(torch.float16, device="meta")
    for seed, name in enumerate(("subject", "style")):
        save_file(
            {k: t.clone() for k, t in tiny.full_size.attention_lora(model, 1, seed).items()},
            folders / "loras" / f"{name}.safetensors",
        )
    lora = pack.nodes.bridge.lora
    sources = lora.loras.load_pair("subject.safetensors", "style.safetensors", 1.0, 1.0)
    fitted = pack.nodes.bridge.lora.fitting.fit(sources, model)
    ones = pack.ziplora_core.coefficients.Coefficients.ones(fitted.loras)
    name = pack.nodes.bridge.saved.save(lora.zipped.ZippedLoRA(sources, fitted, ones), "big")
    size = (folders / "output" / "ziplora" / name).stat().st_size
    assert 4 * 1_571_840 <= size <= 4 * 1_571_840 + 300_000


def test_np_loras_mu_is_the_files_own(pack, folders, pair, monkeypatch):
    """Read back by a pack whose default is another."""
    patcher, zipped = pair
    saved, direct = pack.nodes.bridge.saved, pack.ziplora_core.direct
    update = {k: layer["content"] for k, layer in direct.np_lora.soften(zipped.fitted.loras, 2.0).layers.items()}
    with monkeypatch.context() as patch:
        other = replace(direct.np_lora.METHOD, settings={"mu": 2.0})
        patch.setitem(direct.METHODS, "NP-LoRA", other)
        patch.setattr(direct.np_lora.soften, "__defaults__", (2.0,))
        merged = pack.nodes.bridge.direct.merge(patcher, zipped.sources, "NP-LoRA")
        name = saved.save(merged, "direct")
    again = saved.load(patcher, name)
    assert again.method == "NP-LoRA" and again.settings == {"mu": 2.0}
    for key, layer in again.fitted.loras.layers.items():
        assert torch.equal(layer["content"].down, update[key].down), key


def rewritten(folders, name, change):
    """A saved file with other words about itself."""
    path = folders / "output" / "ziplora" / name
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata()
    about = json.loads(metadata["ziplora"])
    change(about)
    save_file(load_file(path), path, {**metadata, "ziplora": json.dumps(about)})


def test_files_from_before_mu_was_written_are_read_with_the_one_they_had(pack, folders, pair):
    patcher, zipped = pair
    saved, merged = pack.nodes.bridge.saved, pack.nodes.bridge.direct.merge(patcher, pair[1].sources, "NP-LoRA")
    expected = pack.ziplora_core.direct.np_lora.soften(zipped.fitted.loras, 0.5)
    name = saved.save(merged, "direct")
    rewritten(folders, name, lambda about: about.update(settings={}))
    for key, layer in saved.load(patcher, name).fitted.loras.layers.items():
        assert torch.equal(layer["content"].down, expected.layers[key]["content"].down), key
    for wrong in ("much", -1, None, float("nan"), True):
        rewritten(folders, name, lambda about, wrong=wrong: about.update(settings={"mu": wrong}))
        with pytest.raises(ValueError, match=f"'{name}' has broken metadata .mu is "):
            saved.load(patcher, name)


HEADERS_ALONE = 2**18  # bytes: more than all headers that a test reads


def bytes_read() -> int:
    """By this thread so far, of files."""
    with open("/proc/thread-self/io") as file:
        return int(re.search(r"rchar: (\d+)", file.read())[1])


@pytest.fixture
def no_numbers(pack, monkeypatch):
    """As on the server's event loop: no number is looked at, and no more is read than headers."""
    if not os.path.exists("/proc/thread-self/io"):
        pytest.skip("what a thread reads is told by Linux's /proc")

    def look(*_):
        raise AssertionError("numbers were read")

    monkeypatch.setattr(pack.ziplora_core.files, "all_finite", look)
    before = bytes_read()
    yield
    assert bytes_read() - before < HEADERS_ALONE


def test_validation_of_large_files_reads_headers_alone(pack, folders, no_numbers):
    for name in ("one", "two"):
        sparse_lora(folders / "loras" / f"{name}.safetensors")
    names = ("one.safetensors", "two.safetensors")
    assert pack.nodes.LoadLoRAPair.validate_inputs(*names) is True
    assert [v.size > 8e8 - 4 for v in pack.nodes.LoadLoRAPair.fingerprint_inputs(*names)] == [True, True]
    assert pack.nodes.SparsifyLoRA.validate_inputs(names[0]) is True
    assert pack.nodes.SparsifyLoRA.fingerprint_inputs(names[0]).size > 8e8 - 4


def test_validation_of_a_saved_pair_searches_no_files(pack, folders, pair, request):
    """Its LoRA is gone, beside large ones: even of its size."""
    saved, loras = pack.nodes.bridge.saved, folders / "loras"
    name = saved.save(pair[1], "mine")
    size = (loras / "style.safetensors").stat().st_size
    rename(folders, "style.safetensors", "elsewhere.safetensors")
    for number in range(40):
        sparse_lora(loras / f"large {number}.safetensors")
        shutil.copyfile(loras / "elsewhere.safetensors", loras / f"alike {number}.safetensors")
        flip_a_byte(loras / f"alike {number}.safetensors")
    os.utime(loras, (2e9, 2e9))
    request.getfixturevalue("no_numbers")
    assert 40 * size > 4 * HEADERS_ALONE
    node = pack.nodes.LoadZippedLoRA
    assert node.validate_inputs(name) is True
    first = node.fingerprint_inputs(name)
    assert first == node.fingerprint_inputs(name)
    os.utime(loras / "elsewhere.safetensors", (1e9, 1e9))
    assert node.fingerprint_inputs(name) != first


def test_a_candidate_that_cannot_be_read_is_passed_over(pack, folders, pair, monkeypatch):
    patcher, zipped = pair
    saved, hashes, loras = pack.nodes.bridge.saved, pack.nodes.bridge.lora.hashes, folders / "loras"
    name = saved.save(zipped, "mine")
    shutil.copyfile(loras / "style.safetensors", loras / "a bad disk.safetensors")
    rename(folders, "style.safetensors", "z.safetensors")
    sha256 = hashes.sha256

    def read(path):
        if "bad disk" in path:
            raise OSError(5, "Input/output error")
        return sha256(path)

    monkeypatch.setattr(hashes, "sha256", read)
    assert saved.load(patcher, name).sources["style"].name == "z.safetensors"


def in_place(path, other):
    """Other bytes in the same file, with the old times."""
    times = path.stat()
    with path.open("r+b") as file:  # not a byte shorter on the way
        file.write(other.read_bytes())
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def grown(path, other):
    with path.open("ab") as file:
        file.write(b"\0")


@pytest.mark.parametrize(
    "change",
    [
        in_place,
        lambda path, other: os.replace(other, path),
        grown,
        lambda path, other: path.unlink(),
    ],
    ids=["written over, with its old times", "replaced", "grown", "deleted"],
)
def test_a_file_that_changes_while_it_is_read_is_noticed(pack, folders, pair, monkeypatch, change):
    files, path = pack.ziplora_core.files, folders / "loras" / "subject.safetensors"
    other, clock = folders / "other", folders / "clock"
    shutil.copyfile(path, other)
    flip_a_byte(other)
    check, seen = files._check_numbers, []

    def check_and_change(*given):
        check(*given)
        if not seen:
            later_than(clock, path)
            change(path, other)
        seen.append(given)

    monkeypatch.setattr(files, "_check_numbers", check_and_change)
    with pytest.raises(files.LoRAFileError, match=r"'subject.safetensors' (has changed while it was read|is missing)"):
        pack.nodes.bridge.lora.loras.load("subject.safetensors", 1.0)
    assert len(seen) > 1


def test_a_lora_that_cp_put_in_the_place_of_another_is_seen(pack, folders, pair):
    """`cp -p` keeps size and modification time; no pair may be bound to the hash of the file that was there."""
    patcher, zipped = pair
    saved, path, other = pack.nodes.bridge.saved, folders / "loras" / "subject.safetensors", folders / "other"
    shutil.copy2(path, other)
    flip_a_byte(other)
    shutil.copystat(path, other)
    name, before = saved.save(zipped, "mine"), pack.nodes.bridge.lora.loras.fingerprint(path.name)
    later_than(folders / "clock", path)
    shutil.copy2(other, path)
    assert path.stat().st_mtime_ns == zipped.sources["content"].version[2]
    assert pack.nodes.bridge.lora.loras.fingerprint(path.name) != before
    with pytest.raises(ValueError, match="'subject.safetensors' has changed since it was loaded"):
        saved.save(zipped, "again")
    with pytest.raises(ValueError, match="'subject.safetensors' .* has changed since"):
        saved.load(patcher, name)


def new_rights(path):
    path.chmod(0o600)


def linked(path):
    """As tools do that store equal files once."""
    os.link(path, path.with_suffix(".again"))


def away_and_back(path):
    path.rename(path.with_suffix(".away"))
    path.with_suffix(".away").rename(path)


def put_back(path):
    """From a copy, with its old times."""
    shutil.copy2(path, path.with_suffix(".copy"))
    os.replace(path.with_suffix(".copy"), path)


def touched(path):
    os.utime(path, (1e9, 1e9))


@pytest.mark.parametrize("change", [new_rights, linked, away_and_back, put_back, touched])
def test_the_same_bytes_are_the_same_file(pack, folders, pair, monkeypatch, change):
    """Its pair is saved, and, where its modification time is the same, not zipped again."""
    hashes, saved, loras = pack.nodes.bridge.lora.hashes, pack.nodes.bridge.saved, pack.nodes.bridge.lora.loras
    monkeypatch.setattr(hashes, "_SETTLED", -1.0)
    path = folders / "loras" / "subject.safetensors"
    names = (path.name, "style.safetensors")
    loras.load_pair(*names, 1.0, 1.0)
    before, version = pack.nodes.LoadLoRAPair.fingerprint_inputs(*names), hashes.version(str(path))
    later_than(folders / "clock", path)
    change(path)
    assert hashes.version(str(path)) != version, "the file system says another time"
    again = saved.load(pair[0], saved.save(pair[1], "mine"))
    assert again.sources["content"].sha256 == pair[1].sources["content"].sha256
    again = pack.nodes.LoadLoRAPair.fingerprint_inputs(*names)
    assert (again == before) == (change is not touched)
    assert pack.nodes.LoadLoRAPair.fingerprint_inputs(*names) == again
    assert loras.load(path.name, 1.0).version == again[0]


def test_the_hash_is_that_of_the_numbers_that_were_read(pack, folders, pair):
    for source in pair[1].sources.by_concept.values():
        content = (folders / "loras" / source.name).read_bytes()
        assert pack.nodes.bridge.disk.provenance.bound(source).sha256 == hashlib.sha256(content).hexdigest()


def test_a_name_with_line_breaks_is_one_line_of_a_report(pack, folders, pair):
    """As file systems allow them: of every kind that Python, or a table's reader, takes for one."""
    odd = "a\u2028b\u2029c\x85d\ne\x0bf\x1cg\u202eh"
    rename(folders, "subject.safetensors", f"{odd}.safetensors")
    lora, optimize = pack.nodes.bridge.lora, pack.nodes.bridge.optimize
    sources = lora.loras.load_pair(f"{odd}.safetensors", "style.safetensors", 1.0, 1.0)
    tensors = {**sources["content"].tensors, f"{odd}.lora_up.weight": torch.ones(1, 1)}
    content = replace(sources["content"], tensors=tensors)
    sources = replace(sources, by_concept={**sources.by_concept, "content": content})
    fitted = pack.nodes.bridge.lora.fitting.fit(sources, pair[0].model)
    ones = pack.ziplora_core.coefficients.Coefficients.ones(fitted.loras)
    solver = pack.ziplora_core.solver
    outcome = optimize.outcome.Outcome(sources, fitted, solver.Settings(), ones, solver.Result(ones))
    text = optimize.report.report(outcome)
    lines = text.split("  \n")
    assert (
        all(line.isprintable() for line in lines)
        and text.splitlines() == [line + "  " for line in lines[:-1]] + lines[-1:]
    )
    assert sum("a�b�c�d�e�f�g�h" in line for line in lines) == 2, "the file's own line, and the note on its tensors"
    zipped = lora.zipped.ZippedLoRA(sources, fitted, ones)
    about = pack.nodes.bridge.export.export_tensors(zipped, 0, "fp16", "kohya").metadata
    assert about["modelspec.title"].isprintable() and about["modelspec.description"].isprintable()


def test_another_configuration_beside_a_file_is_refused(pack, folders, pair):
    """The file's bytes are the same, its updates are not. Older zips do not say what it was."""
    patcher, saved = pair[0], pack.nodes.bridge.saved
    own = folders / "loras" / "own"
    own.mkdir()
    tensors = load_file(folders / "loras" / "subject.safetensors")
    tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}
    rank = next(t.shape[0] for key, t in tensors.items() if key.endswith("lora_down.weight"))
    save_file(tensors, own / "adapter_model.safetensors")
    config = own / "adapter_config.json"

    def says(alpha: float) -> None:
        config.write_text(json.dumps({"r": rank, "lora_alpha": alpha}))

    says(rank / 2)
    lora = pack.nodes.bridge.lora.loras
    sources = lora.load_pair("own/adapter_model.safetensors", "style.safetensors", 1.0, 1.0)
    assert sources["content"].config and not sources["style"].config
    name = saved.save(pack.nodes.bridge.direct.merge(patcher, sources, "sum"), "configured")
    assert saved.load(patcher, name).sources["content"].config == sources["content"].config
    path = folders / "output" / "ziplora" / name
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
        numbers = {key: file.get_tensor(key) for key in file.keys()}
    about = json.loads(metadata["ziplora"])
    for concept in ("content", "style"):
        del about[concept]["config"]
    save_file(numbers, path.with_name("old.safetensors"), {**metadata, "ziplora": json.dumps(about)})
    says(rank / 4)
    with pytest.raises(ValueError, match="'adapter_config.json' beside 'own/adapter_model.safetensors' gave"):
        saved.load(patcher, name)
    assert saved.load(patcher, "old.safetensors")
    config.unlink()
    with pytest.raises(ValueError, match="restore that file, or zip again"):
        saved.load(patcher, name)
    says(rank / 2)
    assert saved.load(patcher, name)
