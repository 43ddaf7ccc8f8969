"""The rules of the house: the lock, the order of the rooms, the public names, light imports, no machine's paths."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import pairdr

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pairdr"

# A module imports only from rooms named before its own. A folder is one room: its files may share a contract.
ROOMS = (
    *("errors", "records", "rows", "options", "config", "store_config"),
    *("lines", "formats", "files", "artefact", "blocks", "progress", "ids"),
    *("sources", "texts", "collection"),
    *("measures", "answers", "fusion"),
    *("losses", "ranks", "auxiliary", "gradcache", "dropout"),
    *("tokens", "start", "readme", "encoder", "backends", "ray_connection", "vectors", "versions"),
    *("filters", "indexes", "lexical", "teachers"),
    *("workers", "cluster"),
    *("batches", "objective", "tuning", "checkpoint", "watch", "loop"),
    *(
        "check",
        "costs",
        "encode",
        "encode_ray",
        "index",
        "load",
        "search",
        "parts",
        "searcher",
        "evaluate",
        "ask",
        "mine",
        "scoring",
        "teach",
        "label",
        "label_ray",
        "train",
        "warm",
    ),
    *("gate", "export"),
    "exchange",
    "geometry",
    *(
        "table",
        "compare",
        "card",
        "origin",
        "findings",
        "evidence",
        "audit",
        "relabel",
        "work",
        "makers",
        "steps",
        "pipeline",
        *("charts", "lengths", "report", "page_style", "report_sections", "report_page", "reproduce"),
        "commands",
        "store_commands",
        "audit_commands",
        "exchange_commands",
        "report_commands",
        "serve",
        "serve_commands",
        "cli",
        "__main__",
        "__init__",
    ),
)

# None of these may load torch when it is imported.
LIGHT = (
    *("errors", "records", "options", "config", "store_config"),
    *("lines", "formats", "files", "artefact", "collection", "tokens", "vectors"),
    *(
        "versions",
        "lexical",
        "filters",
        "search",
        "parts",
        "searcher",
        "measures",
        "answers",
        "check",
        "encode",
        "encode_ray",
        "mine",
        "scoring",
        "label",
        "label_ray",
        "evaluate",
        "ask",
        "compare",
        "index",
        "load",
    ),
    *("indexes.exact", "indexes.candidates", "indexes.faiss", "indexes.database", "indexes.milvus", "indexes.pgvector"),
    "indexes.address",
    "indexes.engine",
    "indexes.postgres",
    "indexes.shards",
    "indexes.sharded",
    *("exchange", "exchange.files", "exchange.training", "exchange.corpora", "exchange.imports", "exchange.exports"),
    *("backends", "backends.exported", "backends.onnx", "backends.openvino", "gate"),
)

LOCKED_EXTRAS = ("demo", "train", "faiss", "milvus", "pgvector", "ray", "sources", "onnx", "openvino", "serve", "dev")
LOCK_LINE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([0-9][A-Za-z0-9.]*)")
MOST_LINES = 400

Module = tuple[str, ...]  # ("sources", "beir"); the package itself is ()


def module_of(path: Path) -> Module:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: Module) -> str:
    return module[0] if module else "__init__"


def dotted(module: Module) -> str:
    return ".".join(("pairdr", *module))


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Walk everything but what stands under `if TYPE_CHECKING:`."""
    yield node
    children = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        children = iter(node.orelse)
    for child in children:
        yield from runtime_nodes(child)


def source_of(node: ast.ImportFrom, path: Path) -> Module | None:
    """Name the pairdr module after `from`; None for another library's."""
    named = tuple(node.module.split(".")) if node.module else ()
    if node.level == 0:
        return named[1:] if named[0] == "pairdr" else None
    folder = path.parent.relative_to(PACKAGE).parts
    return folder[: len(folder) - node.level + 1] + named


def imports_of(path: Path) -> Iterator[tuple[Module, int]]:
    """Yield every pairdr module that a file imports at run time, with its line."""
    for node in runtime_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first, *rest = alias.name.split(".")
                if first == "pairdr":
                    yield tuple(rest), node.lineno
        elif isinstance(node, ast.ImportFrom) and (source := source_of(node, path)) is not None:
            for alias in node.names:
                if (source, alias.name) == ((), "__version__"):
                    continue
                yield (submodule if (submodule := (*source, alias.name)) in FILES else source), node.lineno


def loaded_after(statement: str, *packages: str) -> list[str]:
    """Run a statement in a fresh interpreter; say which of the packages that has loaded."""
    program = f"""
import sys
try:
    {statement}
except SystemExit as end:
    assert not end.code, end.code
print()
print("loaded", *sorted(set({packages}) & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()[1:]


def kept_files(folder: Path = ROOT) -> Iterator[Path]:
    """Yield every file that .gitignore does not leave out; an archive without git is read alike."""
    lines = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    patterns = [".git", *(line for line in lines if line and not line.startswith("#"))]
    for path in sorted(folder.iterdir()):
        anchored = f"/{path.relative_to(ROOT).as_posix()}"
        if any(fnmatch(anchored if pattern.startswith("/") else path.name, pattern) for pattern in patterns):
            continue
        if path.is_dir():
            yield from kept_files(path)
        else:
            yield path


def locked_names() -> list[str]:
    matches = map(LOCK_LINE.fullmatch, (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines())
    return [normalised(match[1]) for match in matches if match]


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_lock_is_names_and_versions_only():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert lines
    assert [line for line in lines if not LOCK_LINE.fullmatch(line)] == []


def test_lock_names_each_package_once():
    names = locked_names()
    assert len(names) == len(set(names))


def test_lock_holds_every_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + [line for extra in LOCKED_EXTRAS for line in extras[extra]]
    names = {normalised(re.match(r"[\w.-]+", line)[0]) for line in wanted}
    assert names - set(locked_names()) == set()


def test_every_module_has_a_room():
    assert [dotted(module) for module in FILES if room_of(module) not in ROOMS] == []


@pytest.mark.parametrize("module", FILES, ids=dotted)
def test_imports_only_from_rooms_before(module: Module):
    own = room_of(module)
    allowed = set(ROOMS[: ROOMS.index(own)])
    if len(module) > 1 or FILES[module].name == "__init__.py":
        allowed.add(own)  # a file in a folder, which is one room
    late = [(line, dotted(other)) for other, line in imports_of(FILES[module]) if room_of(other) not in allowed]
    assert late == []


def test_no_circles():
    graph = {dotted(module): {dotted(other) for other, _ in imports_of(path)} for module, path in FILES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_public_names_are_sorted_and_resolve():
    assert list(pairdr.__all__) == sorted(set(pairdr.__all__))
    for name in pairdr.__all__:
        assert getattr(pairdr, name) is not None


def test_no_public_name_is_a_modules_name():
    modules = {part for module in FILES for part in module} | set(ROOMS)
    assert set(pairdr.__all__) & modules == set()


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = pairdr.no_such_name


def test_importing_pairdr_loads_neither_torch_nor_numpy():
    assert loaded_after("import pairdr", "torch", "numpy") == []


@pytest.mark.parametrize("name", LIGHT)
def test_light_module_loads_no_torch(name: str):
    assert loaded_after(f"import pairdr.{name}", "torch") == []


def test_help_loads_no_torch():
    statement = "sys.argv = ['pairdr', '--help']; from pairdr.cli import main; main()"
    assert loaded_after(statement, "torch") == []


def test_no_file_is_too_long():
    lengths = {dotted(module): len(path.read_text(encoding="utf-8").splitlines()) for module, path in FILES.items()}
    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == {}


def test_no_file_names_a_machine():
    # The brackets keep this line from matching itself.
    machine = re.compile(r"(?<![\w.~})-])/(?:work|farm|root)/|file:[/]/|[+]cpu\b")
    found = []
    for path in kept_files():
        content = path.read_bytes()
        if b"\0" in content:
            continue
        for number, line in enumerate(content.decode(errors="replace").splitlines(), start=1):
            if machine.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []
