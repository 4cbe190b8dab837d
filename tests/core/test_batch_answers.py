"""What a server may answer while a batch runs, and what becomes of the rows; each server is a fake in the same loop."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from aiohttp import web
from fake_comfyui import PICTURE, FakeComfyUI, cut, hasten, rows, run

from ziplora_batch.results import DONE, INTERRUPTED, REFUSED, UNFETCHED, Results

ERRORS = {"1": {"class_type": "Save", "errors": [{"message": "Value 0 smaller than min of 16", "details": "width"}]}}


@pytest.fixture(autouse=True)
def swift(monkeypatch: pytest.MonkeyPatch) -> None:
    hasten(monkeypatch)


def statuses(results: Results) -> list[str]:
    return [outcome.status for outcome in results.last.values()]


def kept(results: Results) -> list[bytes]:
    return [(results.folder / p.path).read_bytes() for outcome in results.last.values() for p in outcome.files]


# --- a prompt of which a part is accepted --------------------------------------------------------------------------


@pytest.mark.parametrize("held", [True, False])
def test_a_prompt_that_is_accepted_in_part_is_refused(tmp_path: Path, held: bool) -> None:
    async def accept(request: web.Request) -> web.Response:
        fake.take(await request.json())
        return web.json_response({"prompt_id": fake.prompts[-1], "node_errors": ERRORS})

    fake = FakeComfyUI(POST_prompt=accept)
    fake.held = held
    results = run(fake, rows("a"), tmp_path)
    assert [(o.status, o.error) for o in results.last.values()] == [
        (REFUSED, "Save (1): Value 0 smaller than min of 16: width")
    ]
    assert fake.count("POST /interrupt") and not fake.running and not results.sent


@pytest.mark.parametrize("held", [True, False])
def test_a_part_is_noticed_where_the_answer_was_lost(tmp_path: Path, held: bool) -> None:
    """By what the queue, or the history, says is run."""

    async def accept(request: web.Request) -> web.StreamResponse:
        fake.take(await request.json())
        return await cut(request)

    fake = FakeComfyUI(POST_prompt=accept)
    fake.held, fake.outputs = held, []
    results = run(fake, rows("a"), tmp_path)
    ((status, error),) = [(o.status, o.error) for o in results.last.values()]
    assert status == REFUSED and error.endswith("does not accept what Save (1) is given") and not fake.running
    whole = FakeComfyUI(POST_prompt=accept)
    fake, whole.held = whole, False
    assert statuses(run(whole, rows("a"), tmp_path, retry=True)) == [DONE]


def test_a_part_that_an_earlier_client_sent_is_no_row(tmp_path: Path) -> None:
    fake = FakeComfyUI()
    fake.outputs = []
    (job,) = rows("a")
    fake.take({"prompt_id": "earlier", "prompt": job.prompt})
    results = Results(tmp_path)
    results.sending(job.key, "http://fake", "earlier")
    results.close()
    fake.outputs = None
    results = run(fake, [job], tmp_path)
    assert statuses(results) == [DONE] and len(fake.prompts) == 2
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert (lines[0]["status"], lines[0]["prompt_id"]) == (INTERRUPTED, "earlier") and "Save (1)" in lines[0]["error"]


# --- pictures that were here before --------------------------------------------------------------------------------


def lose(results: Results) -> None:
    for path in results.folder.glob("files/*/*.png"):
        path.unlink()


def test_a_name_that_means_another_picture_now_brings_none_of_it(tmp_path: Path) -> None:
    fake = FakeComfyUI()
    lose(run(fake, rows("a"), tmp_path))
    fake.output[fake.cache["a"]] = b"of another row"
    results = run(fake, rows("a"), tmp_path)
    assert kept(results) == [PICTURE + b"a"] and fake.count("POST /free") == 1


def test_a_server_that_forgets_after_the_next_prompt_is_asked_once_more(tmp_path: Path) -> None:
    """ComfyUI's worker looks whether it is to forget after each prompt, and may take ours first."""
    fake = FakeComfyUI()
    lose(run(fake, rows("a", "b"), tmp_path))
    fake.busy = True
    fake.output = dict.fromkeys(fake.output, b"of another row")
    results = run(fake, rows("a", "b"), tmp_path)
    assert statuses(results) == [DONE, DONE] and kept(results) == [PICTURE + b"a", PICTURE + b"b"]
    assert fake.count("POST /free") == 1 and len(fake.prompts) == 5, "one prompt of two was sent twice"


def test_pictures_go_where_an_older_client_had_them(tmp_path: Path) -> None:
    fake = FakeComfyUI()
    before = run(fake, rows("a"), tmp_path)
    (job,) = rows("a")
    log = tmp_path / "results.jsonl"
    log.write_text(log.read_text(encoding="utf-8").replace(f"a {job.key[:32]}/", f"a {job.key[:8]}/"), encoding="utf-8")
    lose(before)
    results = run(fake, rows("a"), tmp_path)
    assert kept(results) == [PICTURE + b"a"] and len(fake.prompts) == 1
    assert [p.path for p in results.last[job.key].files] == [f"files/a {job.key[:8]}/a_00000_.png"]


def test_a_picture_that_is_gone_on_both_sides_is_drawn_again(tmp_path: Path) -> None:
    fake = FakeComfyUI()
    lose(run(fake, rows("a", "b"), tmp_path))
    fake.output.clear()
    results = run(fake, rows("a", "b"), tmp_path)
    assert statuses(results) == [DONE, DONE] and kept(results) == [PICTURE + b"a", PICTURE + b"b"]
    assert fake.count("POST /free") == 1, "it has forgotten all of it"


@pytest.mark.parametrize("free", [200, 404, 500])
def test_a_server_that_does_not_forget_makes_no_row_done(tmp_path: Path, free: int) -> None:
    async def refuse(request: web.Request) -> web.Response:
        return web.Response(status=free)

    fake = FakeComfyUI(POST_free=refuse)
    first = run(fake, rows("a"), tmp_path)
    was = next(iter(first.last.values())).files
    lose(first)
    fake.output[fake.cache["a"]] = b"of another row"
    for _ in range(2):
        results = run(fake, rows("a"), tmp_path)
        (outcome,) = results.last.values()
        assert outcome.status == UNFETCHED and outcome.files == was and "another picture" in outcome.error
        assert not list(tmp_path.glob("files/*/*.png")), "another row's picture is left"
    del fake.answers["POST /free"]
    assert kept(run(fake, rows("a"), tmp_path)) == [PICTURE + b"a"]


def test_what_never_came_is_drawn_again_where_one_asks_for_it(tmp_path: Path) -> None:
    fake = FakeComfyUI(GET_view=lambda request: asyncio.sleep(0, web.Response(status=404)))
    results = run(fake, rows("a"), tmp_path)
    (outcome,) = results.last.values()
    assert outcome.status == UNFETCHED and "--retry-errors" in outcome.error
    fake.output.clear()
    del fake.answers["GET /view"]
    assert statuses(run(fake, rows("a"), tmp_path)) == [UNFETCHED] and len(fake.prompts) == 1
    assert kept(run(fake, rows("a"), tmp_path, retry=True)) == [PICTURE + b"a"]


HTML = {"text": "<html>sign in</html>", "content_type": "text/html"}


@pytest.mark.parametrize("answer", [{"status": 500}, {"status": 502}, {"status": 401}, {"status": 403}, HTML])
def test_an_error_of_one_request_draws_nothing_again(tmp_path: Path, answer: dict) -> None:
    fake = FakeComfyUI()
    before = run(fake, rows("a"), tmp_path)
    (was,) = before.last.values()
    lose(before)
    fake.answers["GET /view"] = lambda request: asyncio.sleep(0, web.Response(**answer))
    results = run(fake, rows("a"), tmp_path)
    (outcome,) = results.last.values()
    assert (outcome.status, outcome.prompt_id, outcome.files) == (UNFETCHED, was.prompt_id, was.files)
    del fake.answers["GET /view"]
    assert kept(run(fake, rows("a"), tmp_path)) == [PICTURE + b"a"]
    assert len(fake.prompts) == 1 and not fake.count("POST /free")


# --- one row that never ends ---------------------------------------------------------------------------------------


async def half(request: web.Request) -> web.StreamResponse:
    answer = web.StreamResponse(headers={"Content-Length": "2000", "Content-Type": "image/png"})
    await answer.prepare(request)
    await answer.write(b"x" * 1000)
    await cut(request)
    return answer


@pytest.mark.parametrize("how", [half, cut, lambda request: asyncio.sleep(0, web.Response(status=502))])
def test_a_picture_that_always_breaks_off_keeps_no_other_row(tmp_path: Path, how) -> None:
    async def view(request: web.Request) -> web.StreamResponse:
        if request.query["filename"].startswith("a_"):
            return await how(request)
        return web.Response(body=b"other", content_type="image/png")

    results = run(FakeComfyUI(GET_view=view), rows("a", "b"), tmp_path)
    assert {job.name: results.last[job.key].status for job in rows("a", "b")} == {"a": UNFETCHED, "b": DONE}


def test_an_upload_that_always_breaks_off_keeps_no_other_row(tmp_path: Path) -> None:
    picture = tmp_path / "p.png"
    picture.write_bytes(b"picture")
    made = rows("a", "b", uploads={"p.png": picture})
    results = run(FakeComfyUI(POST_upload=cut), made, tmp_path / "results")
    assert [results.last[job.key].status for job in made] == [REFUSED, DONE]
    assert "POST /upload/image" in results.last[made[0].key].error


@pytest.mark.parametrize("how", [cut, lambda request: asyncio.sleep(0, web.Response(status=502))])
def test_a_step_that_fails_again_and_again_ends_its_row_alone(tmp_path: Path, how) -> None:
    """The history of one prompt never comes, though the queue is answered."""

    async def history(request: web.Request) -> web.StreamResponse:
        key = request.path.rpartition("/")[2]
        return await how(request) if key == fake.prompts[0] else web.json_response({key: fake.history[key]})

    fake = FakeComfyUI(GET_history=history)
    results = run(fake, rows("a", "b"), tmp_path)
    assert {job.name: results.last[job.key].status for job in rows("a", "b")} == {"a": UNFETCHED, "b": DONE}
    assert len(fake.prompts) == 2, "drawn again"


# --- odd words -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subfolder", [5, None, ["a"], {"b": 1}, "\ud800"])
def test_a_history_of_another_shape_ends_no_batch(tmp_path: Path, subfolder: object) -> None:
    fake = FakeComfyUI()
    fake.shown = {"gifs": [{"filename": "a.gif", "subfolder": subfolder, "type": "output"}, 5, None], "text": 7}
    results = run(fake, rows("a", "b"), tmp_path)
    assert statuses(results) == [DONE, DONE]


def test_a_name_that_no_request_can_carry_ends_its_row_alone(tmp_path: Path) -> None:
    fake = FakeComfyUI()
    fake.cache["a"], fake.output[".png"] = "\ud800.png", b"of another row"
    results = run(fake, rows("a", "b"), tmp_path)
    assert [outcome.status for outcome in results.last.values()] == [UNFETCHED, DONE]
