"""The batch command on a bad network, beside a second client, and against its own death: what is lost, and what said.

Real servers throughout; the faults are those of a proxy in front of one.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from graphs import Concept, node
from PIL import Image

from devhost.batches import LightBatch, kills, network
from devhost.proxy import CUT, DRIP, HOLD, HTML, JSON, LATE, Proxy
from devhost.server import ComfyServer
from ziplora_batch import connection
from ziplora_batch import server as client
from ziplora_batch.errors import Unreachable

BASIC = "bWU6czMgY3JldA=="  # me:s3 cret, in base 64
SOON = ("--lost-after", "1")
Rule = Callable[[Any, int], Any]


@pytest.fixture
def batch(tmp_path: Path) -> LightBatch:
    return LightBatch(tmp_path / "batch", 3)


def at(method: str, path: str, fate: Any, times: int | None = None) -> Rule:
    """A rule for one kind of request: always, or so many times."""
    seen = []

    def rule(request: Any, number: int) -> Any:
        if (request.method, request.path) != (method, path) or len(seen) == times:
            return None
        seen.append(number)
        return fate

    return rule


def everything(folder: Path) -> str:
    """All that a results folder says, but for the pictures."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".png"]
    return "\n".join([*map(str, folder.rglob("*")), *(p.read_text(encoding="utf-8") for p in files)])


def test_a_bad_network_loses_no_row_and_repeats_none(server: ComfyServer, tmp_path: Path):
    assert "every row done once" in network(server, tmp_path / "batch", 40, socket_seconds=1.0)


def test_a_client_that_is_killed_loses_no_row_and_repeats_none(server: ComfyServer, tmp_path: Path):
    assert "no row lost" in kills(server, tmp_path / "batch", 6)


def test_a_second_client_on_one_folder_refuses(server: ComfyServer, batch: LightBatch):
    with Proxy(server.url, at("POST", "/prompt", 429)) as proxy:
        proxy.retry_after = "60"
        first = batch.start(proxy.url)
        while ("POST", "/prompt") not in proxy.asked:
            assert first.poll() is None
            time.sleep(0.02)
        status, said = batch.run(server.url)
        assert status == 2 and "another client (process " in said, said
        assert not batch.drawn(server) and not batch.lines()
        first.send_signal(signal.SIGINT)
        said, _ = first.communicate(timeout=60)
        assert first.returncode == 130 and "Traceback" not in said, said
    assert batch.run(server.url)[0] == 0
    batch.check(server)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_prompt_that_arrives_after_its_client_has_ended_is_no_second_one(
    server: ComfyServer, batch: LightBatch, sent: signal.Signals
):
    with Proxy(server.url, at("POST", "/prompt", HOLD, times=1)) as proxy:
        first = batch.start(proxy.url)
        while ("POST", "/prompt") not in proxy.asked:
            assert first.poll() is None
            time.sleep(0.02)
        first.send_signal(sent)
        if sent == signal.SIGINT:
            proxy.released.set()  # it waits for this, so as not to leave a prompt behind
            said, _ = first.communicate(timeout=60)
            assert first.returncode == 130 and "Traceback" not in said, said
            status, said = batch.run(proxy.url)
        else:
            first.wait()
            asked = len(proxy.asked)
            second = batch.start(proxy.url)
            while ("GET", "/queue") not in proxy.asked[asked:]:
                time.sleep(0.02)
            proxy.released.set()
            said, _ = second.communicate(timeout=60)
            status = second.returncode
    assert status == 0, said
    batch.check(server)


# --- what a server may answer --------------------------------------------------------------------------------------


def test_too_many_requests_are_waited_for(server: ComfyServer, batch: LightBatch):
    with Proxy(server.url, at("POST", "/prompt", 429, times=4)) as proxy:
        proxy.retry_after = "0.2"
        status, said = batch.run(proxy.url)
    assert status == 0 and proxy.failed == 4, said
    batch.check(server)
    assert [line["status"] for line in batch.lines()] == ["done"] * 3


@pytest.mark.parametrize(
    ("fate", "says"), [(413, "HTTP 413"), (404, "HTTP 404"), (500, "HTTP 500"), (JSON, "not ComfyUI's")]
)
def test_a_prompt_that_a_server_does_not_take_is_refused_and_kills_nobody(
    server: ComfyServer, batch: LightBatch, fate: Any, says: str
):
    with Proxy(server.url, at("POST", "/prompt", fate)) as proxy:
        status, said = batch.run(proxy.url, more=SOON)
    assert status == 1, said
    assert {(c["status"], says in c["error"]) for c in batch.cells()} == {("refused", True)}, batch.cells()
    assert "lost" not in {line["status"] for line in batch.lines()}
    assert batch.run(server.url, more=("--retry-errors",))[0] == 0
    batch.check(server)


def test_a_server_that_wants_a_password_is_named_and_left(server: ComfyServer, batch: LightBatch):
    with Proxy(server.url, at("POST", "/prompt", 401)) as proxy:
        status, said = batch.run(proxy.url)
        assert status == 2 and "HTTP 401" in said, said
        assert {(c["status"], "HTTP 401" in c["error"]) for c in batch.cells()} == {("not run", True)}
        assert not batch.lines()
        assert batch.run(proxy.url, server.url)[0] == 0
    batch.check(server)


def test_what_a_server_that_wants_a_password_may_have_done_is_not_drawn_elsewhere(
    server: ComfyServer, batch: LightBatch
):
    with Proxy(server.url, lambda request, _: 401 if request.path.startswith("/history") else None) as proxy:
        status, said = batch.run(proxy.url)
        assert status == 2 and "HTTP 401" in said, said
        assert [c["status"] for c in batch.cells()] == ["not fetched", "not run", "not run"]
        status, said = batch.run(proxy.url, server.url)
        assert status == 1 and [c["status"] for c in batch.cells()] == ["not fetched", "done", "done"], said
        proxy.rule = lambda *_: None
        assert batch.run(proxy.url)[0] == 0
    batch.check(server)
    assert "lost" not in {line["status"] for line in batch.lines()}


def test_a_picture_that_cannot_be_had_is_fetched_later_and_not_drawn_again(server: ComfyServer, tmp_path: Path):
    batch = LightBatch(tmp_path / "batch", 5)
    fates = {"r0": 404, "r1": 401, "r2": HTML, "r3": 500}

    def rule(request: Any, number: int) -> Any:
        name = request.query.get("filename", "").partition("_")[0]
        return fates.get(name, CUT if name == "r4" and sum(p == "/view" for _, p in proxy.asked) % 2 else None)

    with Proxy(server.url, rule) as proxy:
        status, said = batch.run(proxy.url, more=SOON)
        assert status == 1, said
        cells = batch.cells()
        assert [c["status"] for c in cells] == ["not fetched"] * 4 + ["done"], cells
        for cell, says in zip(cells, ("HTTP 404", "HTTP 401", "text/html", "HTTP 500"), strict=False):
            assert says in cell["error"]
        fates.clear()
        assert batch.run(proxy.url)[0] == 0
    batch.check(server)


def test_a_bad_server_harms_no_good_one(server: ComfyServer, batch: LightBatch):
    rules = (lambda *_: JSON, lambda *_: HTML, lambda *_: LATE, at("POST", "/prompt", JSON), at("GET", "/ws", 404))
    proxies = [Proxy(server.url, rule) for rule in rules]
    for proxy in proxies:
        proxy.__enter__()
    try:
        status, said = batch.run(*(proxy.url for proxy in proxies), server.url, more=SOON)
    finally:
        for proxy in proxies:
            proxy.__exit__()
    assert status == 0, said
    batch.check(server)


def test_one_server_spelled_three_ways_gets_one_prompt_at_a_time(server: ComfyServer, batch: LightBatch):
    with Proxy(server.url) as proxy:
        port = proxy.url.rpartition(":")[2]
        status, said = batch.run(f"127.0.0.1:{port}", f"http://localhost:{port}/", f"{proxy.url}/")
        assert status == 0 and proxy.sockets == 1, said
    assert {c["server"] for c in batch.cells()} == {f"http://127.0.0.1:{port}"}


def test_an_answer_that_drips_has_an_end(server: ComfyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The deadline is of the whole answer: each byte comes well within the one for silence."""
    assert connection.SHORT.total and connection.LONG.total
    monkeypatch.setattr(client, "FILE", 0.6)
    (entry,) = server.run({
        "draw": node("EmptyImage", width=16, height=16, batch_size=1, color=5),
        "save": node("SaveImage", images=["draw", 0], filename_prefix="drip"),
    }).outputs["save"]["images"]  # fmt: skip

    async def ask(proxy: Proxy) -> None:
        async with client.Server(proxy.url, lost_after=0.0) as asked:
            timeout = aiohttp.ClientTimeout(total=1.2, sock_read=30)
            with pytest.raises(Unreachable, match="GET /queue in time"):
                await asked._to.ask("GET", "queue", lambda answer: answer, timeout)
            monkeypatch.setattr(client, "RATE", 1e9)
            with pytest.raises(Unreachable, match="GET /view in time"):
                await asked.fetch(entry, tmp_path / "a.png")

    with Proxy(server.url, lambda *_: DRIP) as proxy:
        asyncio.run(ask(proxy))
    assert not list(tmp_path.iterdir())


# --- what is shown, and what is never --------------------------------------------------------------------------------


def test_passwords_and_tokens_open_the_door_and_stay_outside(server: ComfyServer, batch: LightBatch):
    def rule(request: Any, number: int) -> Any:
        shown = request.headers.get("X-Token"), request.headers.get("Authorization")
        return None if shown == ("t0ken", f"Basic {BASIC}") else 401

    with Proxy(server.url, rule) as proxy:
        host = proxy.url.partition("://")[2]
        environment = {**os.environ, "ZIPLORA_BATCH_HEADERS": "X-Token: t0ken"}
        status, refused = batch.run(f"http://me:wr0ng@{host}", env=environment)
        assert status == 2 and "HTTP 401" in refused
        status, said = batch.run(f"http://me:s3%20cret@{host}", env=environment)
    assert status == 0, said
    batch.check(server)
    for secret in ("wr0ng", "s3%20cret", "s3 cret", "t0ken", "me:", BASIC):
        assert secret not in refused + said + everything(batch.results)


# --- files ---------------------------------------------------------------------------------------------------------


def test_every_picture_of_a_row_is_kept_under_a_name_of_its_own(server: ComfyServer, batch: LightBatch):
    prefixes = {"a": f"{batch.mark}/a/dog", "b": f"{batch.mark}/b/dog", "long": f"{batch.mark}/{'p' * 100}"}
    graph = {name: node("SaveImage", images=["draw", 0], filename_prefix=prefix) for name, prefix in prefixes.items()}
    graph["draw"] = node("EmptyImage", width=16, height=16, batch_size=4, color=0)
    batch.workflow.write_text(json.dumps(graph), encoding="utf-8")
    batch.write([{"name": "猫" * 96, "color": 1}, {"name": "猫" * 95 + "犬", "color": 2}])
    status, said = batch.run(server.url)
    assert status == 0, said
    for line in batch.lines():
        files = line["files"]
        assert len({file["path"] for file in files}) == 12
        for file in files:
            entry = file["entry"]
            theirs = server.base / "output" / entry["subfolder"] / entry["filename"]
            assert (batch.results / file["path"]).read_bytes() == theirs.read_bytes()
    for sub in "ab":
        assert len(list(batch.results.glob(f"files/*/{batch.mark}/{sub}/dog_*.png"))) == 8


def test_pictures_that_are_gone_or_spoilt_are_fetched_again_or_drawn(server: ComfyServer, batch: LightBatch):
    assert batch.run(server.url)[0] == 0
    batch.check(server)
    gone, empty, changed = batch.kept()
    before = [path.read_bytes() for path in (gone, empty, changed)]
    gone.unlink()
    empty.write_bytes(b"")
    changed.write_bytes(before[2][:-1] + b"x")
    status, said = batch.run(server.url)
    assert status == 0 and [path.read_bytes() for path in (gone, empty, changed)] == before, said
    assert batch.drawn(server) == {"r0": 1, "r1": 1, "r2": 1}, "drawn again, though the server had them"
    server.post("history", {"clear": True}).raise_for_status()
    gone.unlink()
    for theirs in (server.base / "output" / batch.mark).glob("r0_*.png"):
        theirs.write_bytes(before[1])  # the name has come to mean another picture
    status, said = batch.run(server.url)
    assert status == 0, said
    assert batch.drawn(server) == {"r0": 2, "r1": 1, "r2": 1}
    pixels = np.asarray(Image.open(batch.kept()[0]).convert("RGB"))
    assert int.from_bytes(pixels[0, 0].tobytes(), "big") == batch.colour(0)


def test_folders_with_names_as_people_give_them(server: ComfyServer, batch: LightBatch, content: Concept):
    """A picture with a space, one in Japanese, one of 255 bytes, and a subject and a style of one name."""
    lora = server.base / "models" / "loras" / content.lora
    root = batch.folder / batch.mark  # as in the server's loras folder
    names = {"subjects": ["my house", "dog"], "styles": ["日本", "dog", "x" * 238]}
    for number, (side, stems) in enumerate(names.items()):
        (root / side).mkdir(parents=True)
        for count, stem in enumerate(stems):
            data = lora.read_bytes()
            file = root / side / f"{stem}.safetensors"
            file.write_bytes(data + bytes(number * 3 + count))  # a hash of its own
            server.put_lora(file, f"{batch.mark}/{side}/{file.name}")
            picture = np.full((16, 16, 3), 40 * number + 9 * count, np.uint8)
            Image.fromarray(picture).save(file.with_suffix(".png"))
    graph = {"pair": node("LoadLoRAPair", content_lora="", style_lora="", content_strength=1.0, style_strength=1.0)}
    graph["optimise"] = node("ZipLoRAOptimize", content_latents=["c", 0], style_latents=["s", 0])
    for side, latents in (("content", "c"), ("style", "s")):
        graph[latents] = node("VAEEncode", pixels=[f"{side}_picture", 0])
        graph[f"{side}_picture"] = node("LoadImage", image="")
        prefix = f"{batch.mark}/{side}"
        graph[f"save_{side}"] = node("SaveImage", images=[f"{side}_picture", 0], filename_prefix=prefix)
    batch.workflow.write_text(json.dumps(graph), encoding="utf-8")
    command = batch.command(server.url)
    at_table = command.index("--table")
    command[at_table : at_table + 2] = ["--subjects", str(root / "subjects")]
    command += ["--styles", str(root / "styles")]
    status, said = batch.run_command(command)
    assert status == 0, said
    cells = batch.cells()
    assert [c["status"] for c in cells] == ["done"] * 6, said
    pairs = [(c, s) for c in sorted(names["subjects"]) for s in sorted(names["styles"])]
    assert {(c["content_lora"], c["style_lora"]) for c in cells} == {
        (f"{batch.mark}/subjects/{c}.safetensors", f"{batch.mark}/styles/{s}.safetensors") for c, s in pairs
    }
    for cell, (subject, style) in zip(cells, pairs, strict=True):
        made = [
            np.asarray(Image.open(batch.results / name).convert("RGB")) for name in sorted(cell["files"].splitlines())
        ]
        given = [Image.open(root / p) for p in (f"subjects/{subject}.png", f"styles/{style}.png")]
        assert all(map(np.array_equal, made, map(np.asarray, given))), cell["name"]
