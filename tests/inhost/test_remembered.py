"""Zips that are taken from disk: the same to the last bit, of the very same inputs, or made anew."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_apply import largest_difference, weights
from test_zip import NAMES, WORDS, few_steps, file, folder, given, picture, zipped_by  # noqa: F401 (fixtures)

LINE = "taken from disk: zipped on "


@pytest.fixture(autouse=True)
def kept(pack, monkeypatch, tmp_path_factory) -> Path:
    """The folder of remembered zips, empty."""
    import folder_paths

    user = tmp_path_factory.mktemp("user")
    monkeypatch.setattr(folder_paths, "user_directory", str(user))
    monkeypatch.setenv("ZIPLORA_REMEMBER_MB", "50")
    return user / pack.nodes.bridge.disk.remembered.FOLDER


@pytest.fixture
def solved(pack, monkeypatch) -> list:
    """Grows with each zip that is computed."""
    zipping, done = pack.nodes.bridge.optimize.zipping, []
    own = zipping._solve
    monkeypatch.setattr(zipping, "_solve", lambda *given: done.append(1) or own(*given))
    return done


def inputs(three: bool = False, **changed) -> dict:
    words = dict(zip(("subject_prompt", "style_prompt"), WORDS.values(), strict=False))
    stack = {"lora_stack": [(file(NAMES[2]), 0.7, 0.7)], "stack_prompts": WORDS[NAMES[2]]} if three else {}
    return {**given(file(f"te_{NAMES[0]}"), file(NAMES[1]), **words), **stack, **changed}


def zipped_files(kept: Path) -> list[Path]:
    return sorted(kept.glob("*")) if kept.is_dir() else []


@pytest.mark.parametrize("three", [False, True], ids=["two", "three, routed"])
def test_what_is_taken_from_disk_is_what_was_made(pack, miniature, load_miniature, folder, kept, solved, three):  # noqa: F811
    """Of another load of the checkpoint too, as after a restart."""
    with torch.inference_mode():
        first = zipped_by(pack, miniature, **inputs(three))
        (path,) = zipped_files(kept)
        again = load_miniature()
        second = zipped_by(pack, again, **inputs(three))
    assert len(solved) == 1
    fresh, found = first.args[2], second.args[2]
    for concept, of in fresh.coefficients.by_concept.items():
        assert of and all(torch.equal(found.coefficients[concept][name], m) for name, m in of.items())
    assert fresh.routing.keys() == found.routing.keys() and bool(found.routing) == three
    assert all(torch.equal(found.routing[name], matrix) for name, matrix in fresh.routing.items())
    assert (found.settings, found.method, found.dials) == (fresh.settings, fresh.method, fresh.dials)
    assert largest_difference(weights(first.args[0]), weights(second.args[0])) == 0
    assert first.ui.values[0]["filename"] != second.ui.values[0]["filename"] and len(first.ui.values) == 8 + 4 * three
    lines, theirs = first.args[3].split("  \n"), second.args[3].split("  \n")
    (said,) = [line for line in theirs if line not in lines]
    assert said.startswith(LINE) and path.name in said and [line for line in theirs if line != said] == lines
    assert theirs.index(said) == theirs.index("details") - 1
    pack.nodes.bridge.saved.save(found, "again")  # as any zip


def test_drawn_pictures_and_losses_come_back(pack, miniature, folder, kept, solved):  # noqa: F811
    optimize = pack.nodes.bridge.optimize.zipping.optimize
    sources = pack.nodes.LoadLoRAPair.execute(file(NAMES[0]), file(NAMES[1]), 1.0, 1.0).args[0]
    settings = pack.ziplora_core.solver.Settings(steps=2, solver="gradient")
    request = pack.nodes.bridge.drawing.sampling.ReferenceRequest(1, 128)
    with torch.inference_mode():
        encoded = [miniature.clip.encode_from_tokens_scheduled(miniature.clip.tokenize(w)) for w in WORDS.values()]
        prompts = dict(zip(("content", "style"), encoded, strict=False))
        (_, losses, _, drawn), (_, losses_again, _, drawn_again) = (
            optimize(miniature.model, sources, prompts, dict.fromkeys(prompts), settings, request) for _ in range(2)
        )
    assert len(solved) == 1 and losses == losses_again and len(losses["loss"]) == 2
    assert torch.equal(drawn, drawn_again) and drawn.shape[0] == 2


@pytest.fixture
def asked(pack, miniature, folder, monkeypatch):  # noqa: F811
    """`asked(**changed)`: the key that a zip is looked for under, without zipping."""
    remembered = pack.nodes.bridge.disk.remembered

    class Found(Exception):
        pass

    def key(loaded=None, **changed) -> str | None:
        def look(made_of, *rest):
            raise Found(made_of)

        with monkeypatch.context() as patch, pytest.raises(Found) as found, torch.inference_mode():
            patch.setattr(remembered, "find", look)
            zipped_by(pack, loaded or miniature, **inputs(**changed))
        return found.value.args[0]

    return key


def test_any_change_is_another_zip(pack, miniature, load_miniature, folder, asked, monkeypatch):  # noqa: F811
    import nodes

    images = {"subject_images": picture(128, 128, 1), "vae": miniature.vae}
    other = picture(128, 128, 1)
    other[0, 0, 0, 0] = 1 - other[0, 0, 0, 0].round()
    stack = {"lora_stack": [(file(NAMES[2]), 0.7, 0.7)], "stack_prompts": "x"}
    keys = {"as it is": asked()}
    changes = {
        "prompt": {"subject_prompt": "an octopus cup"},
        "strength": {"style_strength": 1.05},
        "text encoder's own strength": {"subject_strength": 0.95},
        "seed": {"seed": 4},
        "quality": {"quality": "paper"},
        "size": {"drawn_size": 96},
        "another file": {"style_lora": file(NAMES[2])},
        "pictures": images,
        "one pixel": {**images, "subject_images": other},
        "a third": stack,
        "a third at another strength": {**stack, "lora_stack": [(file(NAMES[2]), 0.8, 0.8)]},
    }
    keys |= {what: asked(**changed) for what, changed in changes.items()}
    lora = nodes.LoraLoaderModelOnly().load_lora_model_only
    for strength in (0.3, 0.4):
        keys[f"a LoRA on the model at {strength}"] = asked(
            miniature._replace(model=lora(miniature.model, file(NAMES[2]), strength)[0])
        )
    changed = load_miniature()
    with torch.inference_mode():
        changed.model.model.diffusion_model.out[2].bias[0] += 1e-3
    keys["one number of the checkpoint"] = asked(changed)
    named = miniature._replace(model=miniature.model.clone())
    named.model.cached_patcher_init = (load_miniature, ("x_lightning_4step",))  # where newer hosts keep it
    with monkeypatch.context() as patch:
        patch.setattr(pack.nodes.bridge.lora.base_models, "running_checkpoints", lambda: ["x_lightning_4step"])
        keys["the checkpoint's name"] = asked(named)
    code = pack.nodes.bridge.disk.content.of_code()
    monkeypatch.setattr(pack.nodes.bridge.disk.content, "of_code", lambda: code[::-1])
    keys["the pack's code"] = asked()
    monkeypatch.setattr(pack.nodes.bridge.disk.content, "of_code", lambda: code)
    tensors = load_file(folder / file(NAMES[1]))
    name = next(key for key in tensors if key.endswith("lora_up.weight"))
    tensors[name][0, 0] += 1
    save_file(tensors, folder / file(NAMES[1]))
    keys["the file's numbers"] = asked()
    assert None not in keys.values()
    same = [(a, b) for a in keys for b in keys if a < b and keys[a] == keys[b]]
    assert not same


def test_another_configuration_beside_a_file_is_another_zip(pack, miniature, folder, asked):  # noqa: F811
    """Whose bytes are the same."""
    import folder_paths

    own = folder / "own"
    own.mkdir()
    tensors = {k: t for k, t in load_file(folder / file(NAMES[0])).items() if not k.endswith(".alpha")}
    rank = next(t.shape[0] for k, t in tensors.items() if k.endswith("lora_down.weight"))
    save_file(tensors, own / "adapter_model.safetensors")
    folder_paths.filename_list_cache.clear()
    keys = []
    for alpha in (rank / 2, rank / 4, None):
        config = own / "adapter_config.json"
        config.unlink() if alpha is None else config.write_text(json.dumps({"r": rank, "lora_alpha": alpha}))
        keys.append(asked(subject_lora="own/adapter_model.safetensors"))
    assert None not in keys and len(set(keys)) == 3


def test_what_changes_nothing_is_the_same_zip(pack, miniature, load_miniature, asked):
    """Another load of the checkpoint; one whose weights are patched, as while it draws; a clone."""
    from comfy.model_management import load_models_gpu

    import nodes

    before = asked()
    again = load_miniature()
    assert asked(again) == before and asked(miniature._replace(model=miniature.model.clone())) == before
    drawing = load_miniature()
    patched = nodes.LoraLoaderModelOnly().load_lora_model_only(drawing.model, file(NAMES[2]), 1.0)[0]
    load_models_gpu([patched])
    assert patched.backup, "nothing is patched in: this tests nothing"
    assert asked(drawing) == before


def test_what_content_does_not_tell_is_not_remembered(pack, miniature, asked, caplog):
    from comfy.patcher_extension import WrappersMP

    def with_code(do):
        model = miniature.model.clone()
        do(model)
        return miniature._replace(model=model)

    assert asked() is not None
    name = next(iter(k for k in miniature.model.model.state_dict() if k.endswith("proj_in.weight")))
    weight = miniature.model.model.state_dict()[name]
    patch = {name: ("diff", (torch.zeros_like(weight),))}
    known = asked(with_code(lambda model: model.add_patches(patch)))
    assert known not in (None, asked())
    text = {"ss_tag_frequency": "{}"}  # of a LoRA's header, as newer hosts' loaders leave it there
    assert asked(with_code(lambda model: model.set_attachments("lora_metadata", text))) is not None
    for do in (
        lambda model: model.set_model_sampler_cfg_function(lambda args: args["cond"]),
        lambda model: model.add_object_patch("model_sampling", SimpleNamespace()),
        lambda model: model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "x", lambda run, *a, **k: run(*a, **k)),
        lambda model: model.add_patches({(name, None, lambda tensor: tensor): patch[name]}),
        lambda model: model.set_attachments("x", object()),
    ):
        caplog.clear()
        caplog.set_level("INFO")
        assert asked(with_code(do)) is None and "this zip is not remembered on disk: it depends on" in caplog.text
    os.environ["ZIPLORA_REMEMBER_MB"] = "0"
    assert asked() is None


def a_zip(pack, miniature):
    pair = pack.nodes.LoadLoRAPair.execute(file(NAMES[0]), file(NAMES[1]), 1.0, 1.0).args[0]
    zipped = pack.nodes.DirectMergeLoRA.execute(miniature.model, pair, "shared columns").args[0]
    return pack.nodes.bridge.disk.remembered.Remembered(zipped, {"loss": [0.1, 1 / 3]}, "two\nlines")


def test_a_report_says_why_its_zip_is_not_remembered(pack, miniature, folder, kept, monkeypatch):  # noqa: F811
    said = "this zip is not remembered on disk: "
    others = miniature._replace(model=miniature.model.clone())
    others.model.set_attachments("x", object())
    with torch.inference_mode():
        lines = zipped_by(pack, others, **inputs()).args[3].split("  \n")
        (line,) = [line for line in lines if said in line]
        assert line == f"{said}it depends on what other nodes have put on the model (attachments)"
        assert lines.index(line) > lines.index("details") and not zipped_files(kept)
        monkeypatch.setenv("ZIPLORA_REMEMBER_MB", "0.001")
        assert f"{said}it takes " in zipped_by(pack, miniature, **inputs()).args[3] and not zipped_files(kept)
        monkeypatch.setenv("ZIPLORA_REMEMBER_MB", "50")
        assert said not in zipped_by(pack, miniature, **inputs()).args[3]
        assert said not in zipped_by(pack, miniature, **inputs()).args[3], "of one that was remembered"


def test_the_code_is_that_of_the_start(pack, monkeypatch):
    """Also the host's: what a run goes through."""
    content = pack.nodes.bridge.disk.content
    read = []
    own = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path.as_posix()) or own(path))
    assert content.of_code() == content._CODE and not read, "read again while it runs"
    assert content._of_code() == content._CODE
    for part in ("ldm/flux/model.py", "model_base.py", "ops.py", "lora.py", "samplers.py", "sd.py", "sd1_clip.py"):
        assert any(path.endswith(f"/comfy/{part}") for path in read), part
    assert any("/comfy/weight_adapter/" in path for path in read)
    assert any(path.endswith("/ziplora_core/saved.py") for path in read)
    one = next(path for path in read if path.endswith("/comfy/ops.py"))
    monkeypatch.setattr(Path, "read_bytes", lambda path: own(path) + b"#" * (path.as_posix() == one))
    assert content._of_code() != content._CODE


def test_a_damaged_file_counts_as_none(pack, miniature, folder, kept, caplog):  # noqa: F811
    remembered, made = pack.nodes.bridge.disk.remembered, a_zip(pack, miniature)
    key, other = "a" * 64, "b" * 64
    fitted = pack.nodes.bridge.lora.fitting.fit(made.zipped.sources, miniature.model.model)

    def find(of=key):
        return remembered.find(of, made.zipped.sources, fitted)

    assert find() is find(None) is None and not caplog.text
    remembered.keep(key, made)
    (path,) = zipped_files(kept)
    whole = path.read_bytes()
    assert find().loss_map == made.loss_map and find().words == made.words
    flipped = bytearray(whole)
    flipped[-5] ^= 1  # a bit of a coefficient, which stays a number
    in_report = whole.replace(b"cost: ", b"cost! ")
    for damage in (b"", whole[:100], whole[:-8], whole + b"x", bytes(flipped), in_report, b"\xff" * 64):
        path.write_bytes(damage)
        caplog.clear()
        assert damage != whole and find() is None and "damaged and is made anew" in caplog.text
    remembered.keep(key, made)
    assert path.read_bytes()[8:40] == whole[8:40] and find() is not None
    shutil.copy(path, path.with_name(f"{other[:20]}.safetensors"))
    assert find(other) is None, "one key's zip under another's name"
    path.unlink()
    path.mkdir()
    assert find() is None


def test_a_zip_whose_file_is_damaged_is_made_anew(pack, miniature, folder, kept, solved):  # noqa: F811
    with torch.inference_mode():
        zipped_by(pack, miniature, **inputs())
        (path,) = zipped_files(kept)
        path.write_bytes(path.read_bytes()[:-1])
        report = zipped_by(pack, miniature, **inputs()).args[3]
        assert len(solved) == 2 and LINE not in report
        assert LINE in zipped_by(pack, miniature, **inputs()).args[3] and len(solved) == 2


def test_the_oldest_use_goes_first(pack, miniature, folder, kept, monkeypatch):  # noqa: F811
    remembered, made = pack.nodes.bridge.disk.remembered, a_zip(pack, miniature)
    fitted = pack.nodes.bridge.lora.fitting.fit(made.zipped.sources, miniature.model.model)
    monkeypatch.setattr(remembered, "MOST", 3)
    stranger = kept / "notes.txt"
    kept.mkdir()
    stranger.write_text("mine")

    def put(number: int) -> None:
        remembered.keep(str(number) * 64, made)
        os.utime(kept / f"{str(number) * 20}.safetensors", (number, number))

    def there() -> str:
        return "".join(path.name[0] for path in zipped_files(kept) if path != stranger)

    for number in (1, 2, 3):
        put(number)
    assert remembered.find("1" * 64, made.zipped.sources, fitted) is not None  # used just now
    put(4)
    assert there() == "134"
    size = (kept / f"{'1' * 20}.safetensors").stat().st_size
    monkeypatch.setenv("ZIPLORA_REMEMBER_MB", str(2.5 * size / 1e6))
    put(5)
    assert there() == "15" and stranger.exists()
    monkeypatch.setenv("ZIPLORA_REMEMBER_MB", str(0.5 * size / 1e6))
    assert "not remembered on disk: it takes" in remembered.keep("6" * 64, made) and there() == "15"
    monkeypatch.setenv("ZIPLORA_REMEMBER_MB", str(2.5 * size / 1e6))
    large = kept / f"{'7' * 20}.safetensors"
    large.write_bytes(bytes(3 * size))  # of a time when more was allowed
    assert remembered.keep("8" * 64, made) == "" and there() == "18"


def test_a_full_disk_costs_the_memory_and_not_the_zip(pack, miniature, folder, kept, solved, caplog):  # noqa: F811
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    made = a_zip(pack, miniature)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        pack.nodes.bridge.disk.remembered.keep("a" * 64, made)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "this zip could not be remembered on disk" in caplog.text and zipped_files(kept) == []
    kept.rmdir()
    kept.write_text("a file in the folder's place")
    with torch.inference_mode():
        report = zipped_by(pack, miniature, **inputs()).args[3]
    assert len(solved) == 1 and LINE not in report


def test_processes_share_the_folder(pack, miniature, folder, kept, monkeypatch):  # noqa: F811
    """Each writes and reads the same few and makes room: nobody reads half a file, and nobody fails."""
    remembered, made = pack.nodes.bridge.disk.remembered, a_zip(pack, miniature)
    fitted = pack.nodes.bridge.lora.fitting.fit(made.zipped.sources, miniature.model.model)
    monkeypatch.setattr(remembered, "MOST", 2)
    keys = [letter * 64 for letter in "abc"]
    context = multiprocessing.get_context("fork")
    failures = context.SimpleQueue()

    def work() -> None:
        warned = []
        remembered.logging = SimpleNamespace(warning=lambda *said: warned.append(said))
        for turn in range(24):
            key = keys[turn % 3]
            found = remembered.find(key, made.zipped.sources, fitted)
            if found is not None and found.loss_map != made.loss_map:
                warned.append(("another content",))
            remembered.keep(key, made)
        for said in warned:
            failures.put(str(said))

    workers = [context.Process(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    assert failures.empty(), failures.get()
    assert 1 <= len(zipped_files(kept)) <= 2
