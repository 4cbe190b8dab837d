"""The parts of the development host that nothing else would notice breaking."""

from __future__ import annotations

import os
import random
import re
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from devhost import host, install, required, suites
from devhost.base import MissingMiniature, find_miniature, link, make_base


def canonical(line: str) -> str:
    """Name of the package that a requirement line asks for."""
    return re.split(r"[^\w.-]", line)[0].lower().replace("_", "-")


def test_every_package_asked_for_is_pinned() -> None:
    lines = [line for line in install.PINS.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==\S+", line) for line in lines)
    pinned = {canonical(line) for line in lines}
    asked = [
        *install.TOOLS,
        *install.HOST_EXTRAS,
        *install.requirements(host.ROOT),
        install.CARRIER,
        "torch",
        "torchvision",
    ]
    tree = host.DEV / "comfyui"
    if tree.is_dir():  # absent where COMFYUI_PATH names another
        asked += install.requirements(tree)
    assert {canonical(line) for line in asked} <= pinned


def test_a_server_finds_what_users_have_and_no_tool_of_ours() -> None:
    """Installed as ComfyUI and requirements.txt say, and nothing else: so each node on a server runs with that."""
    names = ("torch", "safetensors", "matplotlib", "requests", "pytest", "hypothesis", "peft", "diffusers", "lycoris")
    code = f"from importlib.util import find_spec\nprint(*(name for name in {names} if find_spec(name)))"
    process = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **required.environment()}, capture_output=True, text=True
    )
    assert process.stdout.split() == ["torch", "safetensors", "matplotlib", "requests"], process.stderr


def test_beside_a_python_of_ones_own_its_torch_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tool pulls in another: what that Python has counts as installed, at the very version."""
    commands: list[list[str]] = []
    monkeypatch.setattr(install, "pip", lambda _, command, purpose: commands.append(command))
    monkeypatch.setattr(install, "DEV", tmp_path)
    own = host.Host(host.DEV / "comfyui", tmp_path, own_tree=True, own_python=sys.executable)
    install.install_packages(own, install.Stages())
    for command in commands:  # pip would fetch what it may not see
        assert "--no-deps" in command or "--ignore-installed" not in command
    constraints = Path(commands[-1][commands[-1].index("--constraint") + 1]).read_text(encoding="utf-8").split()
    known = {name: version(name) for name in ("torch", "torchvision", "torchaudio") if find_spec(name)}
    assert constraints == [f"{name}=={version}" for name, version in sorted(known.items())] and "torch" in known
    assert {canonical(tool) for tool in install.TOOLS} <= {canonical(word) for word in commands[-1]}


@pytest.mark.slow
def test_finished_set_up_is_found_at_once() -> None:
    assert install.is_ready(host.current_host()), "run `python3 dev.py setup` first"
    seconds = []
    for _ in range(3):  # the best of three: the machine may be busy
        start = time.monotonic()
        subprocess.run([sys.executable, "dev.py", "setup"], cwd=host.ROOT, capture_output=True, check=True)
        seconds.append(time.monotonic() - start)
    assert min(seconds) < 3.0  # 0.2 s on a machine at rest; asking pip alone takes 4 s


def test_wrong_comfyui_path_is_one_sentence(tmp_path: Path) -> None:
    environment = {**os.environ, "COMFYUI_PATH": str(tmp_path)}
    command = [sys.executable, "dev.py", "setup"]
    done = subprocess.run(command, cwd=host.ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert re.fullmatch(r"error: COMFYUI_PATH names .* holds no main\.py: .*\.\n", done.stderr)


def test_a_named_frontend_is_given_to_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from devhost.process import ComfyProcess

    monkeypatch.delenv("COMFYUI_FRONTEND", raising=False)
    assert "--front-end-root" not in ComfyProcess(tmp_path).command()
    monkeypatch.setenv("COMFYUI_FRONTEND", str(tmp_path))
    with pytest.raises(host.SetupError, match=r"^COMFYUI_FRONTEND names .* holds no index\.html: .*\.$"):
        ComfyProcess(tmp_path).command()
    (tmp_path / "index.html").touch()
    command = ComfyProcess(tmp_path).command()
    assert Path(command[command.index("--front-end-root") + 1]).samefile(tmp_path)


def test_base_directory_leads_to_the_checkout_and_can_be_made_twice(tmp_path: Path) -> None:
    for _ in range(2):
        base = make_base(tmp_path / "base", miniature=False)
    pack = base / "custom_nodes" / "ComfyUI-ZipLoRA"
    assert (pack / "__init__.py").samefile(host.ROOT / "__init__.py")
    assert (base / "models" / "loras").is_dir()


def test_link_follows_a_source_that_moved(tmp_path: Path) -> None:
    old, new, target = tmp_path / "old", tmp_path / "new", tmp_path / "target"
    old.write_text("old")
    new.write_text("new")
    link(old, target)
    link(new, target)
    assert target.read_text() == "new"
    assert old.read_text() == "old"


def test_missing_miniature_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingMiniature, match=r"checkpoint, LoRAs, pictures, world\.json"):
        find_miniature(tmp_path)


@pytest.mark.slow
def test_report_counts_every_outcome(tmp_path: Path) -> None:
    source = "import pytest\n"
    source += "def test_a(): pass\ndef test_b(): pass\ndef test_c(): assert False\ndef test_d(): pytest.skip('x')\n"
    source += "@pytest.fixture\ndef broken(): raise ValueError\ndef test_e(broken): pass\n"
    (tmp_path / "test_sample.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={tmp_path / 'r.xml'}", str(tmp_path)]
    subprocess.run(command, cwd=tmp_path, capture_output=True)
    assert str(suites.read_report(tmp_path / "r.xml")) == "2 passed, 2 failed, 1 skipped"


def test_arguments_choose_suites_and_keep_options() -> None:
    folder = host.ROOT / "tests"
    chosen, options = suites.split_arguments([f"{folder / 'core'}::test_x", "-k", "pair", "-x"])
    assert chosen == {"core": [f"{folder / 'core'}::test_x"]}
    assert options == ["-k", "pair", "-x"]
    assert list(suites.split_arguments([])[0]) == ["core", "inhost", "host", "browser"]


def test_whole_suites_are_shared_out_and_chosen_tests_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suites, "cores", lambda: 3)
    tests = host.ROOT / "tests"
    plan = suites.make_plan([])
    assert [plan.workers(suite) for suite in suites.SUITES] == [3, 3, 3, 3] and not plan.narrowed
    for words in ([f"{tests / 'core'}"], [f"{tests / 'core'}", "-x"], ["--all", f"{tests / 'core'}"]):
        assert suites.make_plan(words).workers("core") == 3
    for words in ([f"{tests / 'core' / 'test_merge.py'}"], [f"{tests / 'core'}", "-s"], ["--pdb"], ["-n0"]):
        plan = suites.make_plan(words)
        assert plan.workers("core") == 1 and plan.narrowed, words
    quick = suites.make_plan(["--quick"])
    assert list(quick.paths) == ["core", "inhost"] and not quick.narrowed
    assert suites.make_plan(["--all"]).every_case and not suites.make_plan(["--all"]).narrowed
    with pytest.raises(SystemExit, match="exclude each other"):
        suites.make_plan(["--quick", "--all"])
    monkeypatch.setattr(suites, "cores", lambda: 64)
    assert suites.make_plan([]).workers("host") == suites.MOST_WORKERS


SHARED_OUT = """
import os, pytest
def test_a(request): request.node.user_properties.append(("drawn", 2))
def test_b(request): request.node.user_properties.append(("drawn", 0.5))
@pytest.mark.parametrize("n", range(4))
def test_n(n): pass
def test_dies():
    if hasattr(os, "dies"): os.kill(os.getpid(), 9)
"""


def shared_out(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> tuple[suites.Count, dict[str, Path]]:
    """A suite "host" of one file, run by two workers as `dev.py test` runs it."""
    tests = folder / "tests" / "host"
    tests.mkdir(parents=True)
    (tests / "test_sample.py").write_text(source)
    for name in ("conftest.py", "pytest.ini"):
        (folder / "tests" / name).write_text((host.ROOT / "tests" / name).read_text(encoding="utf-8"))
    monkeypatch.setattr(suites, "ROOT", folder)
    monkeypatch.setattr(suites, "DEV", folder)
    monkeypatch.setattr(suites, "cores", lambda: 2)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    count = suites.run_suite(host.current_host(), "host", suites.Plan({"host": [str(tests)]}))
    return count, {"host": suites.report_of("host")}


@pytest.mark.slow
def test_results_of_workers_are_counted_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, reports = shared_out(tmp_path, monkeypatch, SHARED_OUT)
    assert str(count) == "7 passed, 0 failed"
    assert suites.figures(reports) == {"drawn": 2.5}
    shown = suites.slowest(reports).splitlines()
    assert len(shown) == 7
    assert all(re.search(r" s  tests/host/test_sample\.py::test_[a-z]+(\[\d\])?$", line) for line in shown)
    assert len(suites.slowest(reports, 3).splitlines()) == 3


@pytest.mark.slow
def test_a_worker_that_dies_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, _ = shared_out(tmp_path, monkeypatch, SHARED_OUT.replace('if hasattr(os, "dies"): ', ""))
    assert count.failed >= 1 and count.passed == 6


@pytest.mark.slow
def test_a_suite_without_tests_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, _ = shared_out(tmp_path, monkeypatch, "")
    assert str(count) == "0 passed, 1 failed"


# What a ComfyUI does that a port concerns: it answers when it can bind, and ends with the system's words when not.
LITTLE_HOST = """
import http.server, sys, time
time.sleep(0.5)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"{}")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_server_whose_port_is_taken_meanwhile_starts_on_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another server answers at that port all the time: it must not be taken for the one that was started."""
    from devhost import process, server

    class Little(server.ComfyServer):
        def command(self) -> list[str]:
            return [sys.executable, "-c", LITTLE_HOST, str(self.port)]

    monkeypatch.setattr(process, "Listener", lambda url: SimpleNamespace(close=lambda: None))
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    with Little(tmp_path / "first") as first:
        ports = [first.port, first.port, process.free_port()]
        monkeypatch.setattr(process, "free_port", lambda: ports.pop(0))
        with Little(tmp_path / "second") as second:
            assert second.port != first.port and not ports
            assert second.is_listening() and first.is_listening()
        fixed = Little(tmp_path / "second")
        fixed.port = first.port
        with pytest.raises(process.ServerDied, match="already in use"):
            fixed.start()
        assert first.is_listening()


def test_ports_for_servers_are_free_and_no_connection_is_given_them() -> None:
    from devhost.process import free_port

    random.seed(0)
    found = {free_port() for _ in range(20)}
    random.seed(0)
    again = {free_port() for _ in range(20)}
    assert max(found) < 32_768 and found != again, "workers with one seed would choose the same"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", min(found)))
        assert min(found) not in {free_port() for _ in range(200)}
