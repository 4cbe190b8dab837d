"""Where a batch's requests go, who is asked for what, and what ends it."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import io
import json
from pathlib import Path

import pytest
from aiohttp import web
from fake_comfyui import PICTURE, FakeComfyUI, batch, hasten, rows, run

from ziplora_batch import jobs, runner
from ziplora_batch import server as client
from ziplora_batch.__main__ import main
from ziplora_batch.results import DONE, REFUSED, UNFETCHED, Outcome, Results


@pytest.fixture(autouse=True)
def swift(monkeypatch: pytest.MonkeyPatch) -> None:
    hasten(monkeypatch)


# --- where requests go ---------------------------------------------------------------------------------------------


def test_nothing_follows_a_redirect_with_what_it_carries(tmp_path: Path) -> None:
    other = FakeComfyUI()

    async def work() -> None:
        async with other.serving() as elsewhere, here.serving() as url:

            async def away(request: web.Request) -> web.Response:
                return web.Response(status=307, headers={"Location": f"{elsewhere}{request.path_qs}"})

            here.answers["GET /ws"] = away
            async with client.Server(url, {"X-Token": "secret"}) as server, server.listening():
                while here.count("GET /ws") < 3:
                    await asyncio.sleep(0.01)

    here = FakeComfyUI()
    asyncio.run(asyncio.wait_for(work(), 60))
    assert not other.asked


# --- several servers -----------------------------------------------------------------------------------------------


def test_who_comes_back_alone_gives_up_what_it_has_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One server refuses a row, goes away, and comes back when the other, which had not, lets nobody in any more."""

    async def picky(request: web.Request) -> web.Response:
        body = await request.json()
        if body["prompt"]["1"]["inputs"]["text"] == "J":
            return web.json_response({"error": {"message": "it lacks a file"}}, status=400)
        first.take(body)
        return web.json_response({"prompt_id": body["prompt_id"]})

    first, second = FakeComfyUI(POST_prompt=picky), FakeComfyUI()
    first.held = second.held = True

    async def until(true) -> None:
        while not true():
            await asyncio.sleep(0.005)

    async def story(work: asyncio.Task) -> None:
        await until(lambda: first.running and second.running)
        first.down = 502
        asked = len(first.asked)
        await until(lambda: len(first.asked) > asked + 10)
        second.down = 401
        asked = len(second.asked)
        await until(lambda: len(second.asked) > asked)
        asked = len(first.asked)
        await until(lambda: len(first.asked) > asked + 10)
        first.finish()
        first.held, first.down = False, None
        return await work

    async def both() -> Results:
        work = asyncio.create_task(batch([first, second], rows("J", "K", "L"), tmp_path))
        return await asyncio.wait_for(story(work), 30)

    results = asyncio.run(both())
    by_name = {job.name: results.last[job.key].status for job in rows("J", "K", "L")}
    assert by_name["J"] == REFUSED and sorted(by_name.values()) == sorted([REFUSED, DONE, UNFETCHED])


def test_a_refusal_looks_at_its_own_row_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a second server is busy, thousands that the first refuses are each looked at a few times."""
    looked = []
    given_up = runner.Batch._given_up
    monkeypatch.setattr(runner.Batch, "_given_up", lambda self, job: looked.append(job) or given_up(self, job))
    made = [jobs.Job(n, str(n), {}, {}, str(n)) for n in range(500)]
    results = Results(tmp_path)
    one, two = (client.Server(f"127.0.0.1:{port}") for port in (1, 2))
    one.identity, two.identity = "one", "two"

    async def work() -> None:
        batch = runner.Batch(made, [one, two], results, quiet=True)
        batch._changed = asyncio.Condition()
        batch._waiting.extend(made)
        batch._present |= {"one", "two"}
        for _ in made:
            job = await batch._take(one)
            assert job is not None
            await batch._end(one, job, Outcome(job.key, REFUSED, one.url, error="no"))
        assert list(batch._waiting) == made

    asyncio.run(work())
    results.close()
    assert len(looked) == len(made)


def test_an_error_of_the_clients_own_disk_is_complained_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: Results, *args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Results, "sending", full)
    with pytest.raises(OSError, match="No space left"):
        run(FakeComfyUI(), rows("a", "b"), tmp_path)
    gc.collect()
    assert "never retrieved" not in caplog.text


def test_names_of_folders_tell_rows_apart(tmp_path: Path) -> None:
    """Two rows of one name, whose keys begin alike: 32 bits of them are not enough."""
    made = rows("a", "b")
    for job, end in zip(made, "xy", strict=True):
        job.name, job.key = "dog", hashlib.sha256(b"").hexdigest()[:12] + end * 52
    results = run(FakeComfyUI(), made, tmp_path)
    places = {p.path: (tmp_path / p.path).read_bytes() for outcome in results.last.values() for p in outcome.files}
    assert sorted(places.values()) == [PICTURE + b"a", PICTURE + b"b"]
    assert len({Path(place).parent for place in places}) == 2


@pytest.mark.parametrize("text", ["日本 \N{SNOWMAN}", "half a pair \ud800"])
def test_words_that_the_terminal_has_not_end_no_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """A name in the table, and what a server says."""
    graph = tmp_path / "w.json"
    graph.write_text(json.dumps({"1": {"class_type": "Save", "inputs": {"text": ""}}}), encoding="utf-8")
    (tmp_path / "t.jsonl").write_text(json.dumps({"name": text, "text": "a"}) + "\n", encoding="utf-8")

    async def refuse(request: web.Request) -> web.Response:
        return web.json_response({"error": {"message": text}}, status=400)

    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", terminal)
    with FakeComfyUI(POST_prompt=refuse).beside() as url:
        command = ["run", str(graph), "--table", str(tmp_path / "t.jsonl"), "--server", url]
        assert main([*command, "--results", str(tmp_path / "results")]) == 1
    terminal.flush()
    said = text.encode("ascii", "backslashreplace")
    assert said + b": refused" in terminal.buffer.getvalue() and terminal.buffer.getvalue().count(said) == 2
