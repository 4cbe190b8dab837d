"""What the registry would ship, built from the checkout and looked into."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path, PurePosixPath

import pathspec
import pytest
import tomllib

ROOT = Path(__file__).resolve().parent.parent.parent

SHIPPED_FOLDERS = {"nodes", "ziplora_core", "ziplora_batch", "workflows", "subgraphs", "web", "locales"}
SHIPPED_FILES = {"__init__.py", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "requirements.txt"}
CORE_MAY_IMPORT = {"torch", "numpy", "safetensors"}
HOST_MODULES = {
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfyui_version",
    "folder_paths",
    "latent_preview",
    "node_helpers",
    "nodes",
}
DRAWN_WITH = {"nodes/figures.py": {"matplotlib"}}  # the pack's own dependencies
CLIENT = "ziplora_batch/"  # a program beside the pack: nothing of the pack or the host, and the host nothing of it
CLIENT_MAY_IMPORT = {"aiohttp", "tqdm", "PIL"}
COMES_WITH_THE_HOST = CORE_MAY_IMPORT | HOST_MODULES | {"PIL", "aiohttp"}
BANNED_MODULES = {"ctypes", "http", "pip", "pickle", "requests", "shelve", "socket", "subprocess", "urllib", "venv"}
BANNED_CALLS = {"eval", "exec", "__import__", "os.system", "os.popen", "torch.load"}
SUFFIXES = {".py", ".json", ".jpg", ".webp", ".md", ".js", ".html"}
LARGEST = 2_750_000  # bytes of the whole archive: no weights, no demo
LONGEST = 350  # lines of a module: what does more than one thing is several


def repository_files() -> list[str]:
    """Files that git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return [name for name in listed if (ROOT / name).is_file()]


def shipped_files() -> list[str]:
    """The registry's archive: tracked files that .comfyignore does not match."""
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    ignored = pathspec.GitIgnoreSpec.from_lines(line for line in lines if line and not line.startswith("#"))
    return [name for name in repository_files() if not ignored.match_file(name)]


def shipped_python() -> list[str]:
    return [name for name in shipped_files() if name.endswith(".py")]


def tools_python() -> list[str]:
    """What developers run beside the tests."""
    return [name for name in repository_files() if re.fullmatch(r"(devhost|benchmarks|recipes)/.*\.py|dev\.py", name)]


def core_python() -> list[str]:
    return [name for name in shipped_python() if name.startswith("ziplora_core/")]


def tree_of(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), name)


def imports(name: str) -> Iterator[tuple[int, str]]:
    """(level, dotted name) of every import, inside functions too. `from . import x` gives (1, "x")."""
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.level, node.module
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, alias.name) for alias in node.names)


def modules_imported(name: str, read: Callable[[str], ast.Module], shipped: Set[str]) -> set[str]:
    """Files that a file imports by relative imports, also where only a type checker would."""
    found = set()
    for node in ast.walk(read(name)):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = PurePosixPath(name).parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for inner in (folder.joinpath(alias.name).as_posix() for alias in node.names):
                wanted = (f"{inner}.py", f"{inner}/__init__.py", f"{folder}.py", f"{folder}/__init__.py")
                found |= set(next(([file] for file in wanted if file in shipped), []))
    return found


def circle_among(graph: Mapping[str, Set[str]]) -> list[str]:
    """Names each of which leads to the next and the last to the first; empty where there is no circle."""
    done: set[str] = set()

    def from_here(way: list[str]) -> list[str]:
        for following in sorted(graph[way[-1]] - done):
            if following in way:
                return way[way.index(following) :]
            if circle := from_here([*way, following]):
                return circle
        done.add(way[-1])
        return []

    return next(filter(None, (from_here([name]) for name in sorted(graph) if name not in done)), [])


def test_no_module_imports_itself_by_way_of_others() -> None:
    shipped = set(shipped_python())
    assert not circle_among({name: modules_imported(name, tree_of, shipped) for name in shipped})


def test_a_circle_is_seen() -> None:
    sources = {"a.py": "from .b import x", "b/__init__.py": "", "b/c.py": "from .. import a", "d.py": "from . import a"}
    sources["b/__init__.py"] = "if TYPE_CHECKING:\n    from .c import y"
    graph = {name: modules_imported(name, lambda n: ast.parse(sources[n]), set(sources)) for name in sources}
    assert circle_among(graph) == ["a.py", "b/__init__.py", "b/c.py"]
    sources["b/c.py"] = "import a"
    graph = {name: modules_imported(name, lambda n: ast.parse(sources[n]), set(sources)) for name in sources}
    assert graph["d.py"] == {"a.py"} and circle_among(graph) == []


@pytest.mark.parametrize("name", [*shipped_python(), *tools_python()])
def test_a_module_is_short_and_says_what_it_is_for(name: str) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= LONGEST
    said = ast.get_docstring(tree_of(name))
    assert said and said.splitlines()[0].endswith((".", ":"))


def test_archive_holds_the_pack_and_nothing_else() -> None:
    shipped = shipped_files()
    tops = {PurePosixPath(name).parts[0] for name in shipped}
    assert tops == SHIPPED_FOLDERS | SHIPPED_FILES
    strange = [n for n in shipped if n not in SHIPPED_FILES and PurePosixPath(n).suffix not in SUFFIXES]
    assert not strange
    assert sum((ROOT / name).stat().st_size for name in shipped) < LARGEST


@pytest.mark.parametrize("name", shipped_python())
def test_relative_imports_lead_to_shipped_files(name: str) -> None:
    shipped = set(shipped_files())
    for level, module in imports(name):
        if level:
            folder = PurePosixPath(name)
            for _ in range(level):
                folder = folder.parent
            target = folder.joinpath(*module.split(".")).as_posix()
            assert {f"{target}.py", f"{target}/__init__.py"} & shipped, f"{name} imports {module}, which does not ship"


@pytest.mark.parametrize("name", shipped_python())
def test_shipped_code_needs_only_what_the_host_has(name: str) -> None:
    for level, module in imports(name):
        top = module.split(".")[0]
        if name.startswith(CLIENT):
            known = CLIENT_MAY_IMPORT | sys.stdlib_module_names
            assert level <= 1 and (level or top in known), f"{name} imports {module}"
            continue
        known = COMES_WITH_THE_HOST | sys.stdlib_module_names | DRAWN_WITH.get(name, set())
        assert level or top in known, f"{name} imports {module}"
        assert level or top not in BANNED_MODULES, f"{name} imports {module}"
        assert "ziplora_batch" not in module, f"{name} imports the client"


def test_the_registrys_own_rules_hold(tmp_path: Path) -> None:
    """As errors and without the project's settings: no exec, no eval, no two statements in a line."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "S102,S307,E702"]
    found = subprocess.run([*command, *shipped_python()], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    (tmp_path / "bad.py").write_text("exec('1'); eval('1')\n", encoding="utf-8")
    caught = subprocess.run([*command, "bad.py"], cwd=tmp_path, capture_output=True, text=True).stdout
    assert all(rule in caught for rule in ("S102", "S307", "E702")), "the rules catch nothing"


def test_what_draws_is_imported_when_it_draws() -> None:
    for name, modules in DRAWN_WITH.items():
        for node in tree_of(name).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert not any(module in ast.unparse(node) for module in modules), f"{name}:{node.lineno}"


@pytest.mark.parametrize("name", shipped_python())
def test_shipped_code_runs_no_text_and_swallows_no_exception(name: str) -> None:
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in BANNED_CALLS, f"{name}:{node.lineno}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{name}:{node.lineno} is a bare except"


def without_encoding(tree: ast.AST) -> list[int]:
    """Lines where a text file is opened in the encoding of the machine, which is not UTF-8 on every Windows."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or any(k.arg in ("encoding", None) for k in node.keywords):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
        mode = next((k.value for k in node.keywords if k.arg == "mode"), node.args[1] if len(node.args) > 1 else None)
        text = mode is None or "b" not in str(getattr(mode, "value", "b"))
        if (ast.unparse(node.func) == "open" and text) or (
            called in ("read_text", "write_text") and len(node.args) < 2
        ):
            found.append(node.lineno)
    return found


def test_text_files_are_opened_as_utf8() -> None:
    for name in (n for n in repository_files() if n.endswith(".py") and not n.startswith("tests/")):
        assert not without_encoding(tree_of(name)), f"{name}: {without_encoding(tree_of(name))}"
    seen = "open(a)\nopen(a, 'wb')\nopen(a, mode='w')\np.read_text()\np.write_text(t, encoding='utf-8')\np.open(5)"
    assert without_encoding(ast.parse(seen)) == [1, 3, 4]


def test_what_other_programs_read_by_their_own_lights_is_plain() -> None:
    """pip and the registry's tools open these in the encoding of the machine, on Windows a page of 256 letters."""
    for name in ("requirements.txt", "pyproject.toml", ".comfyignore", "devhost/pins.txt"):
        assert (ROOT / name).read_bytes().isascii(), name


@pytest.mark.parametrize("name", core_python())
def test_core_never_imports_the_host(name: str) -> None:
    for level, module in imports(name):
        if level:
            assert level <= name.count("/"), f"{name} reaches out of the core for {module}"
        else:
            top = module.split(".")[0]
            assert top in CORE_MAY_IMPORT | sys.stdlib_module_names, f"{name} imports {module}"


def test_only_the_bridge_and_the_schemas_import_the_host() -> None:
    for name in shipped_python():
        if not name.startswith("nodes/bridge/"):
            strays = {module for level, module in imports(name) if not level and module.split(".")[0] in HOST_MODULES}
            # A schema lists the files of a folder; everything else of the host goes through the bridge.
            assert all(module.startswith(("comfy_api", "folder_paths")) for module in strays), f"{name}: {strays}"


def test_no_file_names_the_machine_that_it_was_written_on() -> None:
    homes = re.compile(r"(?<![\w.])(?:/home/\w|/root/\w|/Users/\w|[A-Z]:\\+Users\\)")
    here = {str(ROOT), str(Path.home())} - {"/"}
    for name in repository_files():
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights and pictures
        if name == "tests/core/test_publish_hygiene.py":
            continue
        assert not homes.search(text), f"{name} names a home directory: {homes.search(text)}"
        assert not any(path in text for path in here), f"{name} names the checkout's own place"


def test_project_file_says_what_the_registry_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert re.fullmatch(r"[a-z][a-z0-9-]*", project["project"]["name"])
    assert "comfyui" not in project["project"]["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["project"]["version"])
    assert set(project["project"]["dependencies"]) == set().union(*DRAWN_WITH.values())
    # ComfyUI-Manager reads the one file, the registry the other.
    assert (ROOT / "requirements.txt").read_text(encoding="utf-8").split() == project["project"]["dependencies"]
    comfy = project["tool"]["comfy"]
    assert comfy["PublisherId"]
    assert comfy["DisplayName"] == "ZipLoRA"
    assert comfy["requires-comfyui"].startswith(">=0.3.")


def test_addresses_are_one_repositorys_and_its_owner_is_the_readmes() -> None:
    """Either all name the placeholder, and say that it is one, or none does."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project, readme = tomllib.loads(text), (ROOT / "README.md").read_text(encoding="utf-8")
    urls, comfy = project["project"]["urls"], project["tool"]["comfy"]
    (home,) = re.findall(r"git clone (https://github\.com/[\w-]+/[\w-]+)", readme)
    assert urls["Repository"] == home and urls["Documentation"].startswith(home)
    assert urls["Bug Tracker"] == urls["Issues"] == f"{home}/issues"  # comfy-cli reads the second
    raw = home.replace("github.com", "raw.githubusercontent.com") + "/main/"
    assert (comfy["Icon"], comfy["Banner"]) == (f"{raw}docs/icon.png", f"{raw}docs/banner.jpg")
    workflow = (ROOT / ".github" / "workflows" / "publish.yml").read_text(encoding="utf-8")
    owner = home.split("/")[-2]
    assert f"github.repository_owner == '{owner}'" in workflow and "branches: [main]" in workflow
    assert [
        said.count("OWNER` is a placeholder") + said.count("OWNER is a placeholder") for said in (text, readme)
    ] == [owner == "OWNER"] * 2


# What the registry takes, as `comfy node validate` of comfy-cli 1.23.0 checks it.
REGISTRY_SYSTEMS = ("Microsoft", "POSIX", "MacOS", "OS Independent")
REGISTRY_ACCELERATORS = {"GPU :: NVIDIA CUDA", "GPU :: AMD ROCm", "GPU :: Intel Arc", "NPU :: Huawei Ascend"} | {
    "GPU :: Apple Metal"
}


def test_classifiers_are_the_registrys() -> None:
    said = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["classifiers"]
    for classifier in said:
        kind, _, value = classifier.partition(" :: ")
        assert value in REGISTRY_ACCELERATORS if kind == "Environment" else value.startswith(REGISTRY_SYSTEMS)
        assert kind in ("Environment", "Operating System")
    assert len(said) == len(set(said)) > 1


def test_icon_and_banner_are_as_the_registry_wants_them_and_drawn_by_the_script() -> None:
    import numpy as np
    from PIL import Image

    from demo import emblem

    with Image.open(emblem.ICON) as icon, Image.open(emblem.BANNER) as banner:
        assert icon.size == (400, 400) and icon.format == "PNG"
        assert banner.width * 9 == banner.height * 21 and banner.format == "JPEG"
        for kept, drawn in ((icon, emblem.icon()), (banner, emblem.banner())):
            one, other = (np.asarray(image.convert("RGBA"), float) for image in (kept, drawn))
            assert np.abs(one - other).mean() < 2
    for path in (emblem.ICON, emblem.BANNER):
        assert path.stat().st_size < 60_000
        assert path.relative_to(ROOT).as_posix() not in shipped_files()


def test_what_ships_leads_to_no_tool_that_does_not() -> None:
    """The registry shows the README, and Manager's users have the archive alone."""
    for name in ("README.md", *(n for n in shipped_files() if n.startswith(("web/docs/", "ziplora_batch/")))):
        if name.endswith((".md", ".py")):
            assert "recipes/" not in (ROOT / name).read_text(encoding="utf-8"), name


def test_every_graph_has_a_thumbnail() -> None:
    # The template browser of ComfyUI looks for a .jpg of the same name.
    graphs = sorted((ROOT / "workflows").glob("*.json"))
    bare = [path.name for path in graphs if not path.with_suffix(".jpg").is_file()]
    assert not bare


def test_version_is_the_projects() -> None:
    import ziplora_core

    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{ziplora_core.__version__}"' in project
