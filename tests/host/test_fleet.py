"""The Ray recipe: servers that cannot start, that die, and one Ctrl-C."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest
from waiting import wait_until

ANSWERS = """
import http.server, sys
port = int(sys.argv[sys.argv.index("--port") + 1])
place = sys.argv[sys.argv.index("--listen") + 1]
print("listens on", place, flush=True)
class Queue(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200), self.end_headers(), self.wfile.write(b"{}")
    def log_message(self, *words):
        pass
http.server.HTTPServer((place, port), Queue).serve_forever()
"""
DIES = 'print("no such module: everything", flush=True); raise SystemExit(3)'
HANGS = "import time; print('thinking', flush=True); time.sleep(1000)"


def tree(folder: Path, main: str) -> Path:
    """A ComfyUI whose main.py is this."""
    folder.mkdir()
    (folder / "main.py").write_text(main, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def fleet(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("ray_fleet", root / "recipes" / "ray_fleet.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def keep(fleet: ModuleType, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """A server of a main.py, without Ray; stopped at the end."""
    kept = []

    def make(main: str, **options: Any) -> Any:
        folder = tree(tmp_path / f"tree{len(kept)}", main)
        kept.append(fleet.Server(str(folder), sys.executable, str(tmp_path), [], **options))
        return kept[-1]

    yield make
    for server in kept:
        server.stop()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z" if Path("/proc").is_dir() else True


def test_a_server_that_never_answers_is_given_up_after_three_starts(keep: Callable[..., Any]):
    server = keep(DIES, pauses=(0.01,) * 10)
    state = wait_until(lambda: (s := server.state()).failed and s)
    assert state.failed == "ended with status 3, 3 times in a row; last in its log: no such module: everything"
    assert Path(state.log).read_text().count("no such module") == 3 and not state.ready


def test_a_server_that_hangs_has_a_deadline(keep: Callable[..., Any]):
    server = keep(HANGS, patience=0.5, pauses=())
    state = wait_until(lambda: (s := server.state()).failed and s)
    assert state.failed.startswith("did not answer within 0.5 s, 1 times in a row") and not alive(state.pid)


def test_a_server_that_dies_is_started_again_where_it_was_but_not_for_good(keep: Callable[..., Any]):
    server = keep(ANSWERS, pauses=(0.01,) * 4)
    seen = []
    for _ in range(5):
        state = wait_until(lambda: (s := server.state()).ready and s.pid not in [p for p, _ in seen] and s)
        seen.append((state.pid, state.url))
        os.kill(state.pid, signal.SIGKILL)
    assert len({url for _, url in seen}) == 1 and seen[0][1].startswith("http://127.0.0.1:")
    state = wait_until(lambda: (s := server.state()).failed and s)
    assert "5 times in a row" in state.failed
    assert Path(state.log).read_text().splitlines() == ["listens on 127.0.0.1"] * 5


@pytest.mark.parametrize("what", ["python", "log"])
def test_a_server_that_cannot_even_be_begun_is_given_up(fleet: ModuleType, tmp_path: Path, what: str):
    main = tree(tmp_path / "tree", ANSWERS)
    missing = tmp_path / "nowhere" / "python"
    server = fleet.Server.__new__(fleet.Server)
    begin = fleet.threading.Thread.start
    fleet.threading.Thread.start = lambda thread: None  # until its log is where none can be
    try:
        server.__init__(str(main), str(missing) if what == "python" else sys.executable, str(tmp_path), [])
    finally:
        fleet.threading.Thread.start = begin
    if what == "log":
        server.log = str(tmp_path / "nowhere" / "server.log")
    server._keep()
    state = server.state()
    assert state.failed.startswith("cannot be started: ") and "nowhere" in state.failed


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells children of their parent's death")
def test_who_kills_the_keeper_ends_its_server(root: Path, tmp_path: Path):
    """As the kernel does where memory is short: no line of the keeper's own is run any more."""
    main = tree(tmp_path / "tree", ANSWERS)
    keeper = f"""
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("ray_fleet", {str(root / "recipes" / "ray_fleet.py")!r})
fleet = sys.modules["ray_fleet"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fleet)
server = fleet.Server({str(main)!r}, sys.executable, {str(tmp_path)!r}, [])
while not server.state().ready:
    time.sleep(0.05)
print(server.state().pid, flush=True)
time.sleep(1000)
"""
    process = subprocess.Popen([sys.executable, "-c", keeper], stdout=subprocess.PIPE, text=True)
    try:
        pid = int(process.stdout.readline() if process.stdout else "")
        assert alive(pid)
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not alive(pid))


def test_servers_that_neither_answer_nor_fail_are_not_waited_for_for_good(
    fleet: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Whatever keeps their actors from saying so."""
    waiting = fleet.State("http://127.0.0.1:1", False, "", "server.log", 0, fleet.socket.gethostname())
    monkeypatch.setattr(fleet, "look", lambda servers: [waiting for _ in servers])
    monkeypatch.setattr(fleet.ray, "wait", lambda asking, **options: (asking, []))
    monkeypatch.setattr(fleet, "PAUSES", ())
    monkeypatch.setattr(fleet, "_LOOKING", 0.1)
    with pytest.raises(fleet.FleetError, match=r"0 of 1 servers answer after 0\.4 s; see their logs"):
        fleet.wait([MagicMock()], 0.1, exposed=False)
    assert capsys.readouterr().out == "server 0 starts; its log: server.log\n"


def test_pauses_between_starts_grow(fleet: ModuleType):
    assert list(fleet.PAUSES) == sorted(fleet.PAUSES) and fleet.PAUSES[0] >= 1 and fleet.PAUSES[-1] >= 60


@pytest.fixture
def start(root: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """The recipe over a tree; what is left of it at the end is asked to stop."""
    started = []

    def begin(main: Path, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(root / "recipes" / "ray_fleet.py"), "--comfyui", str(main), "--gpus-each", "0"]
        command += [*more, "--", "run", "nothing.json", "--table", "nothing.csv"]
        environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, preexec_fn=hears_ctrl_c, **pipes))
        return started[-1]

    yield begin
    for process in started:
        process.terminate()
        process.wait()


def test_an_actor_that_is_killed_is_a_sentence_beside_the_batchs_own_status(start: Callable[..., Any], tmp_path: Path):
    """Through Ray itself: the actor's process dies while the batch looks for a row in a table that is none."""
    table = tmp_path / "nothing.csv"
    os.mkfifo(table)  # which the batch waits for
    (tmp_path / "nothing.json").write_text('{"1": {"class_type": "T", "inputs": {"text": ""}}}', encoding="utf-8")
    main = f"import os\nopen({str(tmp_path / 'pids')!r}, 'w').write(f'{{os.getppid()}} {{os.getpid()}}')\n{ANSWERS}"
    process = start(tree(tmp_path / "tree", main))
    try:
        said = ""
        while not said.startswith("servers: "):
            said = process.stdout.readline()
            assert said, process.communicate()
        actor, server = map(int, (tmp_path / "pids").read_text().split())
        os.kill(actor, signal.SIGKILL)
        wait_until(lambda: not alive(server))
    finally:
        with table.open("w", encoding="utf-8") as file:
            file.write("sead\n1\n")
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 2, said + errors
    assert "error: column 'sead' means no input" in errors and "server 0 is gone with its actor" in errors
    assert "Traceback" not in errors


def hears_ctrl_c() -> None:
    """Also where the tests run in the background, whose processes ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_a_folder_without_comfyui_is_a_sentence(start: Callable[..., Any], tmp_path: Path):
    process = start(tmp_path)
    assert process.communicate(timeout=120)[1] == f"error: there is no ComfyUI in {tmp_path}: it has no main.py\n"
    assert process.returncode == 2


def test_a_comfyui_that_cannot_start_ends_the_fleet_with_its_log(start: Callable[..., Any], tmp_path: Path):
    """Through Ray itself."""
    process = start(tree(tmp_path / "tree", DIES), "--servers", "2")
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 2, said + errors
    found = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(found) == 1 and "ended with status 3, 3 times in a row" in found[0]
    log = Path(errors.partition("\nits log: ")[2].splitlines()[0])
    assert log.read_text().count("no such module") == 3
    assert f"its log: {log}" in said and "Traceback" not in errors


def test_one_ctrl_c_ends_the_fleet_while_it_starts(start: Callable[..., Any], tmp_path: Path):
    """And its server, which knows nothing of it: no part of the fleet is left."""
    process = start(
        tree(tmp_path / "tree", f"import os\nopen('{tmp_path}/pid', 'w').write(str(os.getpid()))\n{HANGS}"),
    )
    line = process.stdout.readline() if process.stdout else ""
    assert line.startswith("server 0 starts; its log: "), line
    pid = int(wait_until(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text()))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and errors.splitlines()[-1].startswith("stopped")
    assert "Traceback" not in errors
    wait_until(lambda: not alive(pid))
