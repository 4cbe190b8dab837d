"""Faults in a real server: a clear message, the model as it was, memory back, the next prompt right, no partial file.

Each case is counted; the last line says how many were survived.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faulty import FAST, FAULTS, Bench, check_whole, exported, fault
from graphs import (
    BASE,
    LAYERS,
    Concept,
    Prompt,
    expected_marks,
    is_one_bar,
    marks,
    node,
    optimised,
    stock_loader,
    zipped_picture,
)
from safetensors.torch import load_file, save_file

from devhost.answers import ExecutionFailed, Result
from devhost.server import ComfyServer

WHOLE, TWO = "layerwise, then gradient", {"steps": 2}


@dataclass(frozen=True)
class Stage:
    """Where two steps are struck: the call of a place, the layers and steps that are done by then, other settings."""

    place: str
    at: int
    done: int = 0
    settings: dict[str, Any] = field(default_factory=dict)


STAGES = {
    "plan": Stage("plan", 1),
    "start": Stage("start", 1),
    "layer-wise": Stage("pass without gradient", 5, 0, {"solver": WHOLE}),
    "losses of the direct merge": Stage("pass without gradient", 3, 0, {"objective": "balanced"}),
    "teacher": Stage("pass without gradient", 2, 1),
    "student": Stage("pass with gradient", 2, 1),
    "backward": Stage("backward", 2, 1),
    "backward after layers": Stage("backward", 2, LAYERS + 1, {"solver": WHOLE}),
    "held-out noise": Stage("pass without gradient", 8, 2),
}


@pytest.fixture(scope="module")
def shared(make_server: Callable[..., ComfyServer], content: Concept, style: Concept) -> Iterator[Bench]:
    one_arena = {"MALLOC_ARENA_MAX": "1"}  # what threads keep for themselves would count as held
    bench = Bench(make_server(packs=[FAULTS], environment=one_arena), content, style)
    yield bench
    bench.server.stop()


@pytest.fixture
def bench(shared: Bench, request: pytest.FixtureRequest) -> Iterator[Bench]:
    shared.server.check_alive()
    injected, survived = shared.injected, shared.survived
    yield shared
    # dev.py adds them up and prints them, whichever worker ran the test.
    request.node.user_properties += [
        ("faults injected", shared.injected - injected),
        ("faults survived", shared.survived - survived),
    ]


def came_to(result: Result, done: int, steps: int = 2) -> bool:
    """Whether a run that did not end told of so many layers and steps, on one bar."""
    seen = result.progress("optimise")
    return marks(result) == expected_marks(done, steps) and (not seen or is_one_bar(seen, ended=False))


# Out of memory


@pytest.mark.parametrize("stage", ["layer-wise", "teacher", "student", "backward", "backward after layers"])
def test_out_of_memory_once_is_a_second_run_with_the_least(bench: Bench, stage: str) -> None:
    struck = STAGES[stage]
    with bench.survives(adds=1):
        result = bench.server.run(bench.struck(struck.place, "out of memory", struck.at, **TWO, **struck.settings))
        whole = LAYERS + 2 if "solver" in struck.settings else 2
        assert marks(result) == expected_marks(struck.done, 2) + expected_marks(whole, 2)
        assert is_one_bar(result.progress("optimise")), "the second run goes on where the first has brought the bar"
        assert "it ran out at first, this is the second run" in result.text("report")
        assert "one reference at a time, 7 of 7 transformer blocks" in result.text("report")


@pytest.mark.parametrize("stage", ["layer-wise", "teacher", "student", "backward", "held-out noise"])
def test_out_of_memory_for_good_says_what_to_change(bench: Bench, stage: str) -> None:
    struck = STAGES[stage]
    with bench.survives():
        prompt = bench.struck(struck.place, "out of memory", struck.at, always=True, **TWO, **struck.settings)
        failed = bench.fails(prompt)
        assert failed.node == "optimise" and came_to(failed.result, struck.done)
        assert re.match(r"not enough memory to zip: about .* GB are needed .*; connect smaller latents", failed.text)


def test_out_of_memory_while_drawing_references(bench: Bench) -> None:
    with bench.survives():
        failed = bench.fails(bench.without_references(bench.struck("any pass", "out of memory", 3)))
        assert failed.text.startswith("not enough memory to draw 1 content references of 128 x 128 pixels; lower")


@pytest.mark.parametrize(
    ("kind", "place", "always"),
    [
        ("TrainConceptLoRA", "pass with gradient", False),
        ("TrainConceptLoRA", "backward", True),
        ("UnZipLoRA", "backward", False),
        ("UnZipLoRA", "pass with gradient", True),
    ],
)
def test_out_of_memory_in_training(bench: Bench, kind: str, place: str, always: bool) -> None:
    """What was learned before is on disk in any case."""
    prompt = bench.training(kind, ["fault", 0])
    prompt["fault"] = fault(place, "out of memory", 3, always)
    with bench.survives(adds=1 if kind == "TrainConceptLoRA" else 2):
        if always:
            failed = bench.fails(prompt)
            assert failed.text.startswith("not enough memory to train: about"), failed.text
        else:
            assert bench.server.run(prompt).progress("train")[-1] == (4, 4)


# Interrupts


@pytest.mark.parametrize("stage", STAGES)
def test_interrupted(bench: Bench, stage: str) -> None:
    struck = STAGES[stage]
    with bench.survives():
        prompt = bench.struck(struck.place, "wait", struck.at, **TWO, **struck.settings)
        (result,) = bench.until_waiting(prompt, bench.server.interrupt)
        assert result.interrupted and came_to(result, struck.done)


def test_interrupted_while_drawing_references(bench: Bench) -> None:
    with bench.survives():
        prompt = bench.without_references(bench.struck("any pass", "wait", 3))
        (result,) = bench.until_waiting(prompt, bench.server.interrupt)
        assert result.interrupted and result.said("optimise")[-1].startswith("drawing content references")


def test_interrupted_while_exporting(bench: Bench) -> None:
    prompt = {**bench.direct(), "fault": fault("progress", "wait", 5, value=["zipped", 0])}
    prompt["export"] = exported(["fault", 0])
    with bench.survives():
        (result,) = bench.until_waiting(prompt, bench.server.interrupt)
        assert result.interrupted and len(result.progress("export")) < LAYERS


@pytest.mark.parametrize("kind", ["ExportMergedLoRA", "SaveZippedLoRA"])
def test_interrupted_between_writing_a_file_and_naming_it(bench: Bench, kind: str) -> None:
    """It is finished: the host looks again before the next node."""
    prompt = {**bench.direct(), "fault": fault("rename", "wait", value=["zipped", 0])}
    prompt["file"] = (
        exported(["fault", 0])
        if kind == "ExportMergedLoRA"
        else node(kind, zipped_lora=["fault", 0], filename_prefix="faults/zipped")
    )
    with bench.survives(adds=1):
        bench.until_waiting(prompt, bench.server.interrupt)


@pytest.mark.parametrize(
    ("kind", "place", "at", "steps"),
    [
        ("TrainConceptLoRA", "start", 1, 0),
        ("TrainConceptLoRA", "pass with gradient", 3, 2),
        ("TrainConceptLoRA", "progress", 3, 3),
        ("UnZipLoRA", "plan", 1, 0),
        ("UnZipLoRA", "backward", 3, 1),
    ],
)
def test_training_interrupted(bench: Bench, kind: str, place: str, at: int, steps: int) -> None:
    """What was learned so far is on disk."""
    prompt = bench.training(kind, ["fault", 0])
    prompt["fault"] = fault(place, "wait", at)
    count = 1 if kind == "TrainConceptLoRA" else 2
    before = bench.files()
    with bench.survives(adds=count if steps else 0):
        (result,) = bench.until_waiting(prompt, bench.server.interrupt)
        assert result.interrupted
        for path in bench.files() - before:
            assert metadata(path)["ss_steps"] == str(steps)


def metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


def test_training_interrupted_while_it_draws_class_pictures(bench: Bench) -> None:
    prompt = bench.training("TrainConceptLoRA", ["fault", 0], class_prompt="a red star", class_count=1)
    prompt["fault"] = fault("any pass", "wait", 3)
    with bench.survives():
        (result,) = bench.until_waiting(prompt, bench.server.interrupt)
        assert result.interrupted


def test_training_interrupted_while_it_draws_a_sample(bench: Bench) -> None:
    prompt = bench.training("TrainConceptLoRA", ["fault", 0], sample_every=2)
    prompt["fault"] = fault("pass without gradient", "wait", 5)
    with bench.survives(adds=1):
        (result,) = bench.until_waiting(prompt, bench.server.interrupt)
        assert result.interrupted


# Errors of other packs


@pytest.mark.parametrize("place", ["any pass", "apply_model", "model_function_wrapper", "layer", "backward", "start"])
def test_an_error_of_another_pack_passes_through(bench: Bench, place: str) -> None:
    at = 1 if place == "start" else 2
    with bench.survives():
        failed = bench.fails(bench.struck(place, "error", at, steps=2))
        assert failed.node == "optimise" and failed.kind.endswith("faults.OtherPackError")
        assert failed.text == f"another pack's {place} broke at call {at}"
        assert any("faults" in line and "raise OtherPackError" in line for line in failed.result.error["traceback"])


@pytest.mark.parametrize("kind", ["TrainConceptLoRA", "UnZipLoRA"])
def test_an_error_of_another_pack_passes_through_training(bench: Bench, kind: str) -> None:
    prompt = bench.training(kind, ["fault", 0])
    prompt["fault"] = fault("apply_model", "error", 3)
    with bench.survives(adds=1 if kind == "TrainConceptLoRA" else 2):
        failed = bench.fails(prompt)
        assert failed.kind.endswith("faults.OtherPackError")
        assert failed.text == "another pack's apply_model broke at call 3"


# Numbers that are not finite

CHANGED = r"the (content|style) coefficients of layer 'diffusion_model\.\S+\.weight' had changed most, by \d\S*"
KEPT = r"the last finite coefficients are in '(stopped_\d+_\.safetensors)', for Load Zipped LoRA"
REMEDY = "lower learning_rate or load the model in bf16 or fp32"


@pytest.mark.parametrize(
    ("place", "at", "always", "says"),
    [
        ("pass without gradient", 2, False, r"step 2: the loss is not finite \(content nan, style nan, .*\)"),
        ("pass with gradient", 2, False, r"step 2: the loss is not finite \(content nan, style nan, .*\)"),
        ("backward", 2, True, r"step 2: the gradient is not finite although the loss \(\S+\) is, after 13 tries .*"),
        ("pass without gradient", 3, True, r"step 2: the loss on held-out noise is not finite \(content nan, .*\)"),
    ],
    ids=["teacher", "student", "backward", "held-out noise"],
)
def test_not_finite_names_step_and_layer_and_keeps_the_last_coefficients(
    bench: Bench, place: str, at: int, always: bool, says: str
) -> None:
    steps = 2 if "held-out" in says else 3
    with bench.survives(adds=1):
        failed = bench.fails(bench.struck(place, "not finite", at, always, steps=steps))
        found = re.fullmatch(f"{says}; {CHANGED}; {REMEDY}; {KEPT}", failed.text)
        assert failed.kind == "FloatingPointError" and found, failed.text
        loaded = {
            "checkpoint": bench.direct()["checkpoint"],
            "load": node("LoadZippedLoRA", model=BASE, zipped=found[2]),
            "report": node("PreviewAny", source=["load", 1]),
        }
        report = bench.server.run(loaded).text("report")
        assert "is not finite" in report and bench.content.lora in report, report


def test_not_finite_at_the_first_step_keeps_nothing(bench: Bench) -> None:
    with bench.survives():
        failed = bench.fails(bench.struck("pass with gradient", "not finite", 1, steps=3))
        says = rf"step 1: the loss is not finite \(.*\); no coefficient had changed yet; {REMEDY}; there are no coeff.*"
        assert re.fullmatch(says, failed.text), failed.text


def test_not_finite_in_a_layer_names_it(bench: Bench) -> None:
    with bench.survives():
        failed = bench.fails(bench.struck("layer", "not finite", always=True, solver=WHOLE))
        says = (
            r"the model .* not finite without these LoRAs too \(seen first: layer diffusion_model\.\S+: what .*\); take"
        )
        assert re.match(says, failed.text), "the layer is struck whatever the LoRAs are"


def test_references_that_are_not_finite(bench: Bench) -> None:
    with bench.survives():
        failed = bench.fails(bench.without_references(bench.struck("any pass", "not finite", 3)))
        assert failed.text.startswith("the content LoRA alone draws no picture (its latents are not finite)")


def test_not_finite_coefficients_of_no_file_cannot_be_kept(bench: Bench) -> None:
    """A pair of another node's is bound to no file."""
    prompt = bench.struck("pass with gradient", "not finite", 2, steps=3)
    prompt |= {"export": exported(["zipped", 0]), "other": exported(["zipped", 0])}
    prompt["other"]["inputs"]["rank"] = 2
    prompt |= {"from_files": prompt["pair"], "zipped": bench.direct()["zipped"]}
    prompt["zipped"]["inputs"]["lora_pair"] = ["from_files", 0]
    given = {"content_lora": ["export", 0], "style_lora": ["other", 0]}
    prompt["pair"] = node("PairLoRAs", **given, content_strength=1.0, style_strength=1.0)
    with bench.survives(adds=2):  # the exported files
        failed = bench.fails(prompt)
        assert "step 2: the loss is not finite" in failed.text
        assert "the last finite coefficients could not be saved: content_lora comes from another node" in failed.text


@pytest.mark.parametrize("kind", ["TrainConceptLoRA", "UnZipLoRA"])
def test_not_finite_in_training_names_the_step(bench: Bench, kind: str) -> None:
    prompt = bench.training(kind, ["fault", 0])
    prompt["fault"] = fault("pass with gradient", "not finite", 3)
    before = bench.files()
    with bench.survives(adds=1 if kind == "TrainConceptLoRA" else 2):
        failed = bench.fails(prompt)
        done = 2 if kind == "TrainConceptLoRA" else 1  # the second pass of each step gives out columns
        says = (
            rf"step {done + 1}: the loss is not finite; the largest update is that of layer '.+'; lower learning_rate"
        )
        assert re.match(says, failed.text)
        assert {metadata(path)["ss_steps"] for path in bench.files() - before} == {str(done)}


# Disks


@contextlib.contextmanager
def full(bench: Bench, folder: Path) -> Iterator[None]:
    """No file of the server's may grow beyond 16 kB: as root, too, and without a disk of its own."""
    pid = bench.server.check_alive().pid
    os.truncate(bench.server.log_file, 0)
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (16_384, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def read_only(bench: Bench, folder: Path) -> Iterator[None]:
    """A folder of the kernel's, in which nobody may make a file, root neither."""
    folder.parent.mkdir(exist_ok=True)
    folder.symlink_to("/sys/power")
    try:
        yield
    finally:
        folder.unlink()


@contextlib.contextmanager
def a_file(bench: Bench, folder: Path) -> Iterator[None]:
    """No folder at all."""
    folder.parent.mkdir(exist_ok=True)
    folder.touch()
    try:
        yield
    finally:
        folder.unlink()


def saves_through_links(bench: Bench, folder: Path, other: Path) -> bool:
    """Whether the host's own node writes where a link leads out of a folder: some newer hosts look where it leads."""
    other.mkdir()
    link = folder / "led_away"
    link.symlink_to(other)
    picture = optimised(bench.content, bench.style)["content_picture"]
    prompt = {"picture": picture, "save": node("SaveImage", images=["picture", 0], filename_prefix="led_away/file")}
    try:
        bench.server.run(prompt)
    except ExecutionFailed:
        return False
    finally:
        link.unlink()
    return any(other.iterdir())


DISKS = {"full": full, "read-only": read_only, "no folder": a_file}
TROUBLE = r"(could not be written into the folder|needs a folder in) '\S*' .*\(.+\); see that .* writable"


@pytest.mark.parametrize(
    ("writer", "disk"),
    [
        *itertools.product(("SaveZippedLoRA", "ExportMergedLoRA", "BlindABSheet"), DISKS),
        *itertools.product(("TrainConceptLoRA", "UnZipLoRA"), ("read-only", "no folder")),
    ],
)
def test_a_file_that_cannot_be_written(bench: Bench, tmp_path: Path, writer: str, disk: str) -> None:
    name, folder = f"there_{writer}_{disk}".replace(" ", "_"), bench.server.base / "output"
    prefix = f"{name}/file"
    prompt = bench.direct()
    if writer == "SaveZippedLoRA":
        folder = folder / "ziplora"
        prompt["file"] = node(writer, zipped_lora=["zipped", 0], filename_prefix=prefix)
    elif writer == "ExportMergedLoRA":
        prompt["file"] = exported(["zipped", 0], prefix)
    elif writer == "BlindABSheet":
        pictures = dict.fromkeys(("images_a", "images_b", "subject_reference", "style_reference"), ["picture", 0])
        names = {"name_a": "a" * 20_000, "name_b": "b", "seed": 0, "filename_prefix": prefix}
        prompt |= {"picture": optimised(bench.content, bench.style)["content_picture"]}
        prompt["file"] = node(writer, **pictures, **names)
    else:
        prompt = bench.training(writer, prefix=prefix)
    with bench.survives():
        with DISKS[disk](bench, folder / name):
            failed = bench.fails(prompt)
        if disk == "read-only" and "leads out of the folder" in failed.text:
            assert not saves_through_links(bench, bench.server.base / "output", tmp_path / "other")
        else:
            assert failed.kind == "OSError" and re.search(TROUBLE, failed.text), failed.text
        assert name in failed.text
        if writer in ("TrainConceptLoRA", "UnZipLoRA"):
            assert failed.result.progress("train") == [], "it was trained for nothing"


@pytest.mark.parametrize("writer", ["TrainConceptLoRA", "UnZipLoRA"])
def test_what_was_trained_outlives_a_full_disk(bench: Bench, writer: str) -> None:
    """The LoRA is returned, and the report says that it is in no file."""
    prompt = bench.training(writer, prefix=f"full_{writer}/file")
    prompt["report"] = node("PreviewAny", source=["train", 2 if writer == "TrainConceptLoRA" else 3])
    with bench.survives():
        with full(bench, bench.server.base):
            result = bench.server.run(prompt)
        assert result.progress("train")[-1] == (4, 4)
        lines = result.text("report").splitlines()[: 1 if writer == "TrainConceptLoRA" else 2]
        assert all(re.match(r"full_\w+/file\S* could not be written: .+; save what was learned", x) for x in lines), (
            lines
        )


def test_coefficients_that_cannot_be_kept_on_a_full_disk(bench: Bench) -> None:
    with bench.survives():
        with full(bench, bench.server.base):
            failed = bench.fails(bench.struck("pass with gradient", "not finite", 2, steps=3))
        assert re.match(r"step 2: the loss is not finite", failed.text)
        assert re.search(r"coefficients could not be saved: 'stopped_\d+_.safetensors' " + TROUBLE, failed.text)


# Several prompts, and files that change under them


@pytest.mark.parametrize("share", ["a model", "a pair", "both", "both, and one between them fails"])
def test_queued_together_as_made_alone(bench: Bench, concepts: dict[str, list[Concept]], share: str) -> None:
    first = zipped_picture(bench.content, bench.style, **FAST)
    content, style = (
        (concepts["content"][1], concepts["style"][1]) if share == "a model" else (bench.content, bench.style)
    )
    second = zipped_picture(content, style, **FAST, seed=1)
    if share == "a pair":
        second["other"] = stock_loader(concepts["style"][1].lora, BASE, 0.5)
        for name in ("optimise", "apply"):
            second[name]["inputs"]["model"] = ["other", 0]
    between = [bench.struck("pass with gradient", "out of memory", always=True)] if "fails" in share else []
    with bench.survives():
        alone = [bench.server.run(prompt).images("save")[0] for prompt in (first, second)]
        _, one, *failed, other = bench.until_waiting(bench.blocker(), bench.open, first, *between, second)
        assert "optimise" in one.executed and "optimise" in other.executed
        assert [result.status for result in failed] == ["error"] * len(between)
        for result, expected in zip((one, other), alone, strict=True):
            assert np.array_equal(result.images("save")[0], expected)


@pytest.fixture
def changing(bench: Bench, tmp_path: Path) -> Iterator[tuple[Concept, Path, Path]]:
    """A concept with a file of its own, the file, and another that may take its place."""
    folder = bench.server.base / "models" / "loras"
    shipped, name = load_file(folder / bench.content.lora), "changing.safetensors"
    other = tmp_path / name
    for path, factor in ((folder / name, 0.9), (other, 0.5)):
        save_file({k: t if "alpha" in k else t * factor for k, t in shipped.items()}, path)
    yield Concept(name, bench.content.prompt, bench.content.picture), folder / name, other
    (folder / name).unlink(missing_ok=True)


def test_a_lora_replaced_while_queued_is_the_new_one(bench: Bench, changing: tuple[Concept, Path, Path]) -> None:
    concept, path, other = changing
    prompt = zipped_picture(concept, bench.style, **FAST)
    with bench.survives():
        old = bench.server.run(prompt).images("save")[0]
        copy = shutil.copyfile(other, other.with_name("copy"))
        _, queued = bench.until_waiting(bench.blocker(), lambda: (Path(copy).replace(path), bench.open()), prompt)
        new = queued.images("save")[0]
        mine = Concept(bench.server.put_lora(other, "new.safetensors"), concept.prompt, concept.picture)
        alone = bench.server.run(zipped_picture(mine, bench.style, **FAST)).images("save")[0]
        (path.parent / "new.safetensors").unlink()
        path.unlink()
        assert np.array_equal(new, alone) and not np.array_equal(new, old)
        shutil.copyfile(other, path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda path: os.truncate(path, 1000), r"'changing.safetensors' is (cut off|not a safetensors file)"),
        (lambda path: path.unlink(), r"'changing.safetensors' is missing"),
    ],
    ids=["cut off", "deleted"],
)
def test_a_lora_spoiled_while_queued(
    bench: Bench, changing: tuple[Concept, Path, Path], change: Callable[[Path], None], says: str
) -> None:
    concept, path, other = changing
    prompt = zipped_picture(concept, bench.style, **FAST)
    with bench.survives():
        _, queued = bench.until_waiting(bench.blocker(), lambda: (change(path), bench.open()), prompt)
        assert re.match(says, queued.error["exception_message"])
        shutil.copyfile(other, path)


CHANGES = {
    "another file": lambda path, other: other.replace(path),
    "written over": lambda path, other: path.write_bytes(other.read_bytes()),
    "cut off": lambda path, other: os.truncate(path, 0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_lora_replaced_while_it_is_zipped(bench: Bench, changing: tuple[Concept, Path, Path], change: str) -> None:
    """What was read stays: a merge is of the old numbers; coefficients are bound to a file, and it is not theirs."""
    concept, path, other = changing

    def prompt(act: str) -> Prompt:
        made = {**bench.struck("pass with gradient", act, 99 if act == "error" else 1, steps=1, seed=5)}
        made["pair"]["inputs"]["content_lora"] = concept.lora
        del made["file"]
        return made | {"export": exported(["optimise", 0])}

    kept = other.with_name("kept")
    shutil.copyfile(path, kept)
    with bench.survives(adds=2):
        before = bench.files()
        bench.server.run(prompt("error"))
        (alone,) = bench.files() - before
        before = bench.files()
        bench.until_waiting(prompt("wait"), lambda: (CHANGES[change](path, other), bench.open()))
        (now,) = bench.files() - before
        one, two = load_file(alone), load_file(now)
        assert all(bool((one[k] == two[k]).all()) for k in one)
        shutil.copyfile(kept, path)


@pytest.mark.parametrize("change", CHANGES)
def test_coefficients_are_not_saved_for_a_file_that_has_changed(
    bench: Bench, changing: tuple[Concept, Path, Path], change: str
) -> None:
    concept, path, other = changing
    prompt = bench.struck("pass with gradient", "wait", steps=1)
    prompt["pair"]["inputs"]["content_lora"] = concept.lora
    kept = other.with_name("kept")
    shutil.copyfile(path, kept)
    with bench.survives():
        (result,) = bench.until_waiting(prompt, lambda: (CHANGES[change](path, other), bench.open()))
        says = "'changing.safetensors' has changed since it was loaded; queue again, then save"
        assert result.error["exception_message"].strip() == says
        shutil.copyfile(kept, path)


def test_a_saved_pair_whose_lora_is_replaced_while_queued(bench: Bench, changing: tuple[Concept, Path, Path]) -> None:
    concept, path, other = changing
    prompt = {**bench.direct(), "file": node("SaveZippedLoRA", zipped_lora=["zipped", 0], filename_prefix="replaced")}
    prompt["pair"]["inputs"]["content_lora"] = concept.lora
    with bench.survives(adds=1):
        loaded = {
            "checkpoint": prompt["checkpoint"],
            "load": node("LoadZippedLoRA", model=BASE, zipped=bench.server.run(prompt).text("file")),
            "report": node("PreviewAny", source=["load", 1]),
        }
        copy = shutil.copyfile(other, other.with_name("copy"))
        _, queued = bench.until_waiting(bench.blocker(), lambda: (Path(copy).replace(path), bench.open()), loaded)
        assert "'changing.safetensors' (SHA-256 " in queued.error["exception_message"]
        assert "which has changed since; restore the file, or zip the pair again" in queued.error["exception_message"]


# A server that is killed: last, for it starts anew


@pytest.mark.parametrize("moment", ["optimising", "saving"])
def test_killed(bench: Bench, moment: str) -> None:
    """No partial file under a name that a loader lists; the next server goes on from the same folders."""
    prompt = {
        "optimising": bench.struck("pass with gradient", "wait", 2, steps=3),
        "saving": bench.struck("rename", "wait", steps=1),
    }[moment]
    server = bench.server
    bench.injected += 1
    files = bench.files()
    start = len(server.connection.events)
    server.queue(prompt)
    bench.wait_for_fault(start)
    process = server.check_alive()
    process.kill()
    process.wait()
    server.stop()
    server.start()
    left = bench.files() - files
    assert all(path.name.startswith(".") and path.name.endswith(".ziplora.part") for path in left)
    assert len(left) == (2 if moment == "saving" else 0), "the unfinished file, and the one that reserves its name"
    offered = server.object_info()
    for kind, name in (("LoadZippedLoRA", "zipped"), ("LoadLoRAPair", "content_lora"), ("LoraLoader", "lora_name")):
        assert not any(".part" in file for file in offered[kind]["input"]["required"][name][0])
    after = bench.look()
    assert all(map(np.array_equal, after.pictures, bench.before.pictures))
    assert after.left == bench.before.left
    assert after.memory <= bench.before.memory * 1.02
    for path in left:  # an hour later; a name may be reserved for longer, by a training of days
        os.utime(path, (time.time() - (3601 if path.stat().st_size else 7 * 86401),) * 2)
    prompt["fault"]["inputs"]["at"] = 1000  # never reached
    server.run(prompt)
    new = bench.files() - files
    assert new and not any(path.name.endswith(".part") for path in new)
    for path in new:
        check_whole(path)
    bench.survived += 1
