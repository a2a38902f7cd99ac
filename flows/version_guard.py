"""The guard of versions: digests of all code that a step's files may depend on.

A person raises a step's version when its files change; this module notices that code changed at all, since
`tasks/versions.lock` was written. It follows imports through `tasks.*` and ignores comments, docstrings and layout.
Tables (`*.tsv`) beside an imported module count as code. What cannot change files is left out: errors, notices,
progress, and the store, `step.py` and `text_chunks.py`, which a golden key and their tests guard.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks.step import ROOT, Step

LOCK = ROOT / "tasks" / "versions.lock"
LEFT_OUT = (
    "tasks.errors",
    "tasks.notices",
    "tasks.progress",
    "tasks.step",
    "tasks.store",
    "tasks.text_chunks",
)


def modules_of(module: str, root: Path = ROOT) -> list[str]:
    """List the `tasks.*` modules that a module imports, itself included, in whatever function the import stands."""
    found: list[str] = []
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in found and not name.startswith(LEFT_OUT):
            found.append(name)
            waiting.extend(_imports(_path(name, root), root))
    return sorted(found)


def _path(module: str, root: Path) -> Path:
    return root / (module.replace(".", "/") + ".py")


def _imports(path: Path, root: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [name for name in names if name.startswith("tasks.") and _path(name, root).is_file()]


def tables_of(modules: Sequence[str], root: Path = ROOT) -> list[str]:
    """List the tables (`*.tsv`) in the folders of the modules: data that lies beside code is read by it."""
    folders = {_path(name, root).parent for name in modules}
    return sorted(path.relative_to(root).as_posix() for folder in folders for path in folder.glob("*.tsv"))


def digest(path: Path) -> str:
    """Return a digest of a module's code that comments, docstrings and layout do not touch."""
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [part for part in body if not _is_text(part)]  # type: ignore[attr-defined]
    return hashlib.sha256(json.dumps(_shape(tree)).encode()).hexdigest()[:16]


def _shape(part: Any) -> Any:
    """Return a part of a syntax tree as lists of words, the same whatever Python reads it.

    What is empty is left out: newer versions have more fields, and `ast.dump` shows or hides them.
    """
    if isinstance(part, list):
        return [_shape(one) for one in part]
    if isinstance(part, ast.JoinedStr):  # Python 3.12.1 has an empty text after a nested format
        part.values = [one for one in part.values if not (isinstance(one, ast.Constant) and one.value == "")]
    if isinstance(part, ast.AST):
        told = ((name, value) for name, value in ast.iter_fields(part) if value is not None and value != [])
        return [type(part).__name__, *([name, _shape(value)] for name, value in told)]
    return repr(part)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def current(steps: Sequence[Step[Any, Any]], root: Path = ROOT) -> dict[str, Any]:
    """Return what the lock should hold: step -> version and digests of its modules and tables."""
    return {step.name: lock_entry(step.version, step.__module__, root) for step in steps}


def lock_entry(version: int, module: str, root: Path = ROOT) -> dict[str, Any]:
    """Return a step's entry in the lock: its version, and the digests of its modules and tables."""
    names = modules_of(module, root)
    tables = {name: hashlib.sha256((root / name).read_bytes()).hexdigest()[:16] for name in tables_of(names, root)}
    modules = {name: digest(_path(name, root)) for name in names}
    return {"version": version, "modules": modules | tables}


def stale(now: dict[str, Any], locked: dict[str, Any]) -> list[str]:
    """Say, a line a step, where the code is not what was locked."""
    lines = []
    for name, entry in now.items():
        old = locked.get(name, {"version": None, "modules": {}})
        changed = sorted(
            module
            for module in {*entry["modules"], *old["modules"]}
            if entry["modules"].get(module) != old["modules"].get(module)
        )
        if changed and entry["version"] == old["version"]:
            lines.append(
                f"{name}: {', '.join(changed)} changed since version {entry['version']} was locked. "
                f"Other files now? Raise version. Then python -m flows lock"
            )
        elif entry["version"] != old["version"]:
            lines.append(f"{name}: version {entry['version']} is not locked yet. Run python -m flows lock")
    return lines


def locked() -> dict[str, Any]:
    """Read the lock; empty where there is none."""
    found: dict[str, Any] = json.loads(LOCK.read_bytes()) if LOCK.exists() else {}
    return found


def write(now: dict[str, Any]) -> None:
    """Write the lock."""
    LOCK.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
