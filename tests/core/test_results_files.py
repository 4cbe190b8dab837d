"""Results files of benchmarks, which a run adds to: none of another world, where a pair of one name is another pair."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import new_concepts, one_picture
from demo.manifest import read_manifest

KEPT = Path(one_picture.__file__).parent / "results"


@pytest.mark.parametrize(
    ("script", "words", "file"),
    [
        ("quality", ["--pairs", "house+gilded", "--seeds", "0", "--methods", "default"], "quality"),
        ("trained", ["--pairs", "house+gilded", "--seeds", "0"], "quality"),
        ("prompts", [], "prompts"),
        ("bystanders", ["confirm"], "bystanders"),
        ("verdicts", ["confirm", "--words"], "verdicts"),
    ],
)
def test_what_another_world_has_measured_is_not_taken_for_this_ones(script, words, file, monkeypatch, tmp_path) -> None:
    """Of the first world there are figures of house + gilded, which both worlds have."""
    results = tmp_path / "results.jsonl"
    shutil.copyfile(KEPT / f"{file}.jsonl", results)
    before = results.read_bytes()
    benchmark = importlib.import_module(f"benchmarks.{script}")
    world = read_manifest()
    strong = [one.name for one in world.subjects], [one.name for one in world.styles]
    monkeypatch.setattr(new_concepts, "strong", lambda block: strong)
    for name in ("share_out", "measure"):  # nothing is run, whatever is asked
        monkeypatch.setattr(benchmark, name, lambda *_: [], raising=False)
    monkeypatch.setattr("sys.argv", [f"{script}.py", *words, "--results", str(results)])
    with pytest.raises(SystemExit, match=r"figures of another world.*name a new file \(--results\)"):
        benchmark.main()
    assert results.read_bytes() == before


def test_one_picture_of_another_world_is_not_added_to(monkeypatch) -> None:
    monkeypatch.setattr(one_picture, "share_out", lambda *_: True)
    asked = SimpleNamespace(results=KEPT / "unzip.jsonl", pairs="")
    with pytest.raises(SystemExit, match="figures of another world"):
        one_picture.run(asked)


def test_a_file_of_this_world_is_gone_on_with() -> None:
    from benchmarks.quality_table import read_records, refuse_another_world

    pairs = [record["pair"] for record in read_records(KEPT / "drawn.jsonl")]
    refuse_another_world(KEPT / "drawn.jsonl", pairs, read_manifest().trained())
    assert set(pairs) == {f"{subject.name}+{style.name}" for subject, style in read_manifest().pairs()}
