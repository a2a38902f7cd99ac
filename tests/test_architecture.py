"""The import directions of the house, read off the source.

flows -> steps -> {artifacts, sources, nouns} -> store -> errors
"""

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STEPS = {"download", "parse", "curate", "encode", "train", "evaluate", "pair", "score", "prefer"}
NOUNS = {"dialogue", "oasst", "chats", "text", "gpt", "sample", "report"}
FRAMES = {"parquet", "ndjson", "csv", "ipc"}  # what polars reads from a path
LEAVES = {"errors", "progress", "jsonfile"}  # import nothing of ours
TOP = {"pyproject.toml", "README.md", "LICENSE", "flows", "tasks", "tests", "artifacts"}


def modules() -> list[Path]:
    return sorted([*ROOT.glob("flows/**/*.py"), *ROOT.glob("tasks/**/*.py")])


def name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path: Path, top_level: bool = False, annotations: bool = True) -> Iterator[str]:
    """Yield what a module imports; with `top_level`, only what importing it brings in; or not for annotations only."""
    waiting: list[ast.AST] = [ast.parse(path.read_bytes())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not (top_level and lazy) and not ((top_level or not annotations) and typing):
            waiting.extend(ast.iter_child_nodes(node))


def ours(path: Path) -> set[str]:
    return {found for found in imports(path) if found.startswith(("tasks.", "flows."))}


def part(module: str) -> str:
    return module.split(".")[1] if "." in module else module


@pytest.mark.parametrize("path", modules(), ids=name)
def test_imports_go_one_way(path: Path) -> None:
    me, found = name(path), ours(path)
    if me.startswith("flows."):
        return
    assert not any(module.startswith("flows") for module in found), "tasks know nothing of flows"
    if part(me) in STEPS:
        assert not {part(module) for module in found} & (STEPS - {part(me)}), "steps never import steps"
    if part(me) in NOUNS:
        allowed = NOUNS | LEAVES
        assert {part(module) for module in found} <= allowed, "nouns know values and paths, nothing of the store"
    if part(me) in NOUNS - {"report"}:
        assert not {part(module) for module in found} & ({"report", "sample"} - {part(me)}), "only a report reads both"
    if part(me) == "sample":
        assert {part(module) for module in found} <= {"sample", *LEAVES}
    if part(me) == "store":
        assert {part(module) for module in found} <= {"store", *LEAVES}
    if part(me) in LEAVES:
        assert not found


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Also not by imports inside functions; only annotations may point back."""
    names = {name(path) for path in modules()}
    TopologicalSorter({name(path): {*imports(path, annotations=False)} & names for path in modules()}).prepare()


@pytest.mark.parametrize("path", modules(), ids=name)
def test_heavy_libraries_stay_in_their_rooms(path: Path) -> None:
    me = name(path)
    roots = {found.split(".")[0] for found in imports(path)}
    if not (me.startswith("flows.") or me == "tasks.step"):
        assert "prefect" not in roots
    if not (me.startswith("tasks.gpt.") or me in {"tasks.train", "tasks.tuning", "tasks.evaluate"}):
        assert not roots & {"torch", "transformers"}


@pytest.mark.parametrize("path", [path for path in modules() if part(name(path)) in STEPS], ids=name)
def test_a_step_module_imports_nothing_heavy_at_the_top(path: Path) -> None:
    roots = {found.split(".")[0] for found in imports(path, top_level=True)}
    assert not roots & {"torch", "transformers", "polars", "pyarrow", "tiktoken", "tokenizers", "huggingface_hub"}


@pytest.mark.parametrize("path", modules(), ids=name)
def test_no_module_is_named_like_one_of_the_standard_library(path: Path) -> None:
    assert path.stem not in sys.stdlib_module_names, "Prefect puts a flow's folder first on sys.path"


@pytest.mark.parametrize("path", modules(), ids=name)
def test_no_module_runs_what_data_says(path: Path) -> None:
    """Security: no pickle, no eval, no remote code, no shell."""
    text = path.read_text(encoding="utf-8")
    assert not {found.split(".")[0] for found in imports(path)} & {"pickle", "cloudpickle", "shelve", "marshal"}
    for call in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)):
        called = ast.unparse(call.func)
        given = {word.arg: ast.unparse(word.value) for word in call.keywords}
        assert called not in {"eval", "exec", "os.system"}
        assert given.get("shell") != "True"
        assert given.get("trust_remote_code") in {None, "False"}
        assert called != "torch.load" or given.get("weights_only") == "True"


@pytest.mark.parametrize("path", modules(), ids=name)
def test_a_path_is_never_a_pattern(path: Path) -> None:
    """polars takes `[`, `*` and `?` in a path for a pattern, and would read another store's files."""
    for call in (node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.Call)):
        called = ast.unparse(call.func).rpartition(".")[2]
        if called.startswith(("scan_", "read_")) and called.rpartition("_")[2] in FRAMES:
            given = {word.arg: ast.unparse(word.value) for word in call.keywords}
            assert given.get("glob") == "False", f"{ast.unparse(call)}: say glob=False"


def test_nothing_else_lies_at_the_top_level() -> None:
    tracked = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert tracked - {"build", "treeline.egg-info"} <= TOP
