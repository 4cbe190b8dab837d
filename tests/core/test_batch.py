"""From a table to prompts, and which files count."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from pathlib import Path

import pytest
from fake_comfyui import FakeComfyUI
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ziplora_batch import again, jobs
from ziplora_batch.connection import ended
from ziplora_batch.server import Server

ROOT = Path(__file__).resolve().parent.parent.parent
SDXL = ROOT / "workflows" / "api" / "every_step_with_pictures.json"


@pytest.fixture
def workflow() -> jobs.Prompt:
    return jobs.read_workflow(SDXL)


def kinds(workflow: jobs.Prompt, *columns: str) -> list[tuple[str, str]]:
    found = [jobs.target(workflow, column) for column in columns]
    return [(workflow[key].get("_meta", {}).get("title", ""), name) for key, name in found]


def test_columns_mean_what_a_reader_of_the_graph_would_think(workflow: jobs.Prompt) -> None:
    assert kinds(workflow, "content_lora", "content_prompt", "style_prompt", "prompt") == [
        ("Load LoRA Pair", "content_lora"),
        ("Training prompt of the subject LoRA", "text"),
        ("Training prompt of the style LoRA", "text"),
        ("What to draw: subject in style", "text"),
    ]
    assert kinds(workflow, "content_picture", "style_picture", "KSampler.seed", "Style Strength.style_strength") == [
        ("Picture of the subject", "image"),
        ("Picture of the style", "image"),
        ("KSampler", "seed"),
        ("Style Strength", "style_strength"),
    ]
    assert jobs.target(workflow, "12.seed") == ("12", "seed")


@pytest.mark.parametrize("name", sorted(p.name for p in SDXL.parent.glob("*.json")))
def test_every_bundled_workflow_is_read(name: str) -> None:
    assert jobs.read_workflow(SDXL.parent / name)


@pytest.mark.parametrize(
    ("column", "says"),
    [
        ("seed", r"means 2 inputs.*12\.seed \(ZipLoRA Optimize\).*20\.seed \(KSampler\)"),
        ("sead", "means no input of the workflow; it has: .*seed"),
        ("12.lora_pair", "means no input"),  # a link
    ],
)
def test_columns_that_are_not_clear_are_refused(workflow: jobs.Prompt, column: str, says: str) -> None:
    with pytest.raises(jobs.BatchError, match=says):
        jobs.make(workflow, [jobs.Row({column: "1"})])


def test_cells_become_the_kind_of_value_that_the_workflow_has(workflow: jobs.Prompt, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text(
        'name,12.seed,ridge,3.content_strength,prompt\n"a, b",7,0.5,0.8,12\n,,,,\n,8,,,\n', encoding="utf-8"
    )
    first, second = jobs.make(workflow, jobs.read_table(table))
    assert first.name == "a, b" and (first.number, second.number) == (1, 2)
    optimise, pair = first.prompt["12"]["inputs"], first.prompt["3"]["inputs"]
    assert (optimise["seed"], optimise["ridge"], pair["content_strength"]) == (7, 0.5, 0.8)
    assert first.prompt["17"]["inputs"]["text"] == "12"
    assert second.prompt["12"]["inputs"]["ridge"] == workflow["12"]["inputs"]["ridge"], (
        "an empty cell changed something"
    )
    with pytest.raises(jobs.BatchError, match=r"row 1, 12\.seed: 'many' is not of the kind"):
        jobs.make(workflow, [jobs.Row({"12.seed": "many"})])


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("t.csv", "a,b\n1\n", "line 2: 2 columns expected"),
        ("t.csv", "a,b\n1,2,3\n", "line 2: 2 columns expected"),
        ("t.csv", "a\n", "has no rows"),
        ("t.jsonl", '{"a": 1}\n[1]\n', "line 2: an object expected"),
        ("t.jsonl", '{"a": 1\n', "line 1"),
        ("t.jsonl", '{"a": ' + "[" * 100_000 + "\n", "line 1"),
        ("missing.csv", None, "cannot be read"),
    ],
)
def test_tables_that_are_none(tmp_path: Path, name: str, text: str | None, says: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(jobs.BatchError, match=says):
        jobs.read_table(tmp_path / name)


@pytest.mark.parametrize("about", [None, 5, "title", [], {"title": None}, {"title": ["KSampler"]}])
def test_what_a_workflow_says_of_its_nodes_may_be_anything(workflow: jobs.Prompt, about: object) -> None:
    workflow["20"]["_meta"] = about
    assert jobs.target(workflow, "20.seed") == ("20", "seed")
    with pytest.raises(jobs.BatchError, match=r"20\.seed \(KSampler\)"):
        jobs.target(workflow, "seed")


def test_lists_that_go_too_deep_are_a_sentence(workflow: jobs.Prompt) -> None:
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(jobs.BatchError, match="row 2.* too deep"):
        jobs.make(workflow, [jobs.Row({}), jobs.Row({"12.seed": deep})])
    workflow["20"]["inputs"]["steps"] = [1, 2, 3]
    with pytest.raises(jobs.BatchError, match=r"row 1, 20\.steps: .* is not of the kind"):
        jobs.make(workflow, [jobs.Row({"20.steps": "[" * 100_000})])
    while deep:  # or taking it apart would recurse as deep
        deep = deep.pop()


def test_a_graph_of_the_frontend_is_told_from_an_api_workflow() -> None:
    with pytest.raises(jobs.BatchError, match=r"Export \(API\)"):
        jobs.read_workflow(ROOT / "workflows" / "5 Every step, with pictures.json")


def test_a_link_to_nowhere_never_reaches_a_server(tmp_path: Path) -> None:
    path = tmp_path / "w.json"
    path.write_text(json.dumps({"1": {"class_type": "PreviewAny", "inputs": {"source": ["2", 0]}}}), encoding="utf-8")
    with pytest.raises(jobs.BatchError, match=r"1\.source is linked to node '2', which is not there"):
        jobs.read_workflow(path)


def test_a_key_follows_what_a_job_is_made_from_and_nothing_else(workflow: jobs.Prompt, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"one")
    row = jobs.Row({"content_lora": "a.safetensors"})

    def key(row: jobs.Row = row, folders: tuple[Path, ...] = (tmp_path,), of: jobs.Prompt = workflow) -> str:
        return jobs.make(of, [row], folders)[0].key

    first = key()
    renamed = json.loads(json.dumps(workflow))
    renamed["12"]["_meta"]["title"] = "another title"
    assert key(of=renamed) == first == key(jobs.Row({**row.values, "name": "another name"}))
    assert key(jobs.Row({**row.values, "12.seed": "1"})) != first
    assert key(folders=()) != first
    (tmp_path / "a.safetensors").write_bytes(b"two!")
    assert key() != first, "the file's contents changed"


def test_names_of_a_server_are_found_from_local_paths(tmp_path: Path) -> None:
    listed = ["dog.safetensors", "subjects/dog.safetensors", "styles\\dog.safetensors", "cat.safetensors"]
    assert jobs.listed_name(tmp_path / "subjects" / "dog.safetensors", listed) == "subjects/dog.safetensors"
    assert jobs.listed_name(tmp_path / "styles" / "dog.safetensors", listed) == "styles\\dog.safetensors"
    assert jobs.listed_name(tmp_path / "x" / "dog.safetensors", listed) == "dog.safetensors"
    with pytest.raises(jobs.BatchError, match="lists no LoRA that .*wolf"):
        jobs.listed_name(tmp_path / "wolf.safetensors", listed)


def hashed(monkeypatch: pytest.MonkeyPatch, prompt: jobs.Prompt, *folders: Path) -> set[Path]:
    """Files that are read for a job's key."""
    read: set[Path] = set()
    monkeypatch.setattr(jobs, "sha256", lambda path: read.add(path) or "hash")
    jobs.make(prompt, [jobs.Row({})], folders)
    return read


def test_only_plain_names_below_the_named_folders_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, outside = tmp_path / "input", tmp_path / "secret.txt"
    (inside / "sub").mkdir(parents=True)
    for path in (inside / "dog.png", inside / "sub" / "日本 1.png", outside):
        path.write_bytes(b"x")
    texts = [
        "dog.png",
        "sub/日本 1.png",
        str(outside),
        "../secret.txt",
        "sub/../dog.png",
        "~/x",
        "é" * 200,
        "a\0b",
        ".",
    ]
    prompt = {str(n): {"class_type": "T", "inputs": {"text": text}} for n, text in enumerate(texts)}
    assert hashed(monkeypatch, prompt, inside) == {inside / "dog.png", inside / "sub" / "日本 1.png"}


def test_subject_and_style_may_have_one_file_name(workflow: jobs.Prompt, tmp_path: Path) -> None:
    for side in ("subjects", "styles"):
        (tmp_path / side).mkdir()
        (tmp_path / side / "dog.safetensors").write_bytes(side.encode())
        (tmp_path / side / f"dog{'.png' if side == 'styles' else '.jpg'}").write_bytes(b"the same picture")
    (row,) = jobs.cross(tmp_path / "subjects", tmp_path / "styles", None)
    assert {c: f.parent.name for c, f in row.files.items()} == {"content_lora": "subjects", "style_lora": "styles"}
    row.values |= {"content_lora": "subjects/dog.safetensors", "style_lora": "styles/dog.safetensors"}
    first = jobs.make(workflow, [row])[0].key
    (tmp_path / "subjects" / "dog.safetensors").write_bytes(b"another one")
    assert jobs.make(workflow, [row])[0].key != first


def test_a_line_separator_in_a_cell_ends_no_row(tmp_path: Path) -> None:
    for name, text in (("t.jsonl", '{"prompt": "a\u2028b\x85c"}\n'), ("t.csv", "prompt,x\na\u2028b\x85c,1\n")):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert [row.values["prompt"] for row in jobs.read_table(tmp_path / name)] == ["a\u2028b\x85c"]


def test_differences_of_files_are_said(tmp_path: Path) -> None:
    def safetensors(name: str, data: bytes, **about: object) -> Path:
        header = {
            "__metadata__": {"ziplora": json.dumps(about)},
            "x": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
            "y": {"dtype": "U8", "shape": [1], "data_offsets": [2, 3]},
        }
        text = json.dumps(header).encode()
        (tmp_path / name).write_bytes(len(text).to_bytes(8, "little") + text + data)
        return tmp_path / name

    old = safetensors("a.safetensors", b"abc", content={"name": "dog", "sha256": "1"}, versions={"torch": "2"})
    same = safetensors("b.safetensors", b"abc", content={"name": "dog", "sha256": "2"})
    new = safetensors("c.safetensors", b"abd", content={"name": "dog", "sha256": "2"}, versions={"torch": "3"})
    assert again.difference(old, same) is None
    assert again.difference(old, new) == (
        "1 of 2 tensors, the first 'y'; the content LoRA 'dog' is another file now; torch 2 then, 3 now"
    )


def test_a_result_made_again_is_not_the_one_that_the_server_has(tmp_path: Path, capsys) -> None:
    """Its file says which versions of other files were read, which a server would believe; and a server may take a
    prompt before it forgets."""
    fake = FakeComfyUI()
    fake.busy = True
    about, old = PngInfo(), tmp_path / "a_00000_.png"
    about.add_text("prompt", json.dumps({"1": {"class_type": "Save", "inputs": {"text": "a"}, "is_changed": ["old"]}}))
    Image.new("RGB", (2, 2)).save(old, pnginfo=about)
    fake.cache["a"] = old.name
    fake.output[old.name] = old.read_bytes()

    async def ask() -> int:
        async with fake.serving() as url:
            return await again.again(old, Server(url), yes=True)

    Image.new("RGB", (2, 2), "red").save(drawn := io.BytesIO(), "png")
    fake.draws = drawn.getvalue()
    assert asyncio.run(ask()) == 1 and "a_00001_.png differs: 4 of 12 values" in capsys.readouterr().out
    assert len(fake.prompts) == 2
    assert [list(fake.history[key]["prompt"][2]["1"]) for key in fake.prompts] == [["class_type", "inputs"]] * 2


def test_a_lost_cancellation_is_given_again() -> None:
    """As `asyncio.wait_for` loses one where what it waits for comes in the same moment."""

    async def deaf(times: int) -> None:
        for _ in range(times):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(3600)
        raise LookupError

    async def work() -> list[bool]:
        tasks = [asyncio.create_task(deaf(times)) for times in (0, 1, 2)]
        await asyncio.sleep(0)
        await asyncio.wait_for(ended(tasks, 0.01), 60)
        return [task.done() for task in tasks]

    assert asyncio.run(work()) == [True, True, True]
