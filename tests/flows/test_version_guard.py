"""Laws of the version guard: code that changed is named, comments and layout are not code."""

import copy
from pathlib import Path

import pytest

from flows import chain, version_guard


def test_no_step_has_changed_since_its_version_was_locked() -> None:
    """Raise a step's version if it makes other files now; then `python -m flows lock`."""
    assert version_guard.stale(version_guard.current(chain.STEPS), version_guard.locked()) == []


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "tasks" / "oasst").mkdir(parents=True)
    (tmp_path / "tasks" / "parse.py").write_text(
        "def parse():\n    from tasks.oasst.strict_reader import walk\n    return walk()\n"
    )
    (tmp_path / "tasks" / "oasst" / "strict_reader.py").write_text(
        'def walk():\n    """Walk."""\n    return [1]  # one\n'
    )
    return tmp_path


def state(project: Path, version: int = 1) -> dict[str, object]:
    modules = version_guard.modules_of("tasks.parse", project)
    digests = {name: version_guard.digest(project / f"{name.replace('.', '/')}.py") for name in modules}
    return {"parse": {"version": version, "modules": digests}}


def test_an_import_inside_a_function_is_followed(project: Path) -> None:
    assert version_guard.modules_of("tasks.parse", project) == ["tasks.oasst.strict_reader", "tasks.parse"]


def test_a_changed_helper_is_named(project: Path) -> None:
    before = state(project)
    (project / "tasks" / "oasst" / "strict_reader.py").write_text("def walk():\n    return [2]\n")
    (line,) = version_guard.stale(state(project), before)
    assert line.startswith(
        "parse: tasks.oasst.strict_reader changed since version 1 was locked. Other files now? Raise version."
    )


def test_functions_of_single_texts_are_guarded_with_the_step_that_maps_them() -> None:
    now = version_guard.current(chain.STEPS)
    before = copy.deepcopy(now)
    before["curate"]["modules"]["tasks.dialogue.minhash"] = "another"
    (line,) = version_guard.stale(now, before)
    assert line.startswith("curate: tasks.dialogue.minhash changed since version")
    assert {"tasks.text.bpe", "tasks.text.gate"} <= {*now["encode"]["modules"]}
    assert {"tasks.dialogue.language", "tasks.dialogue.pii", "tasks.dialogue.contamination"} <= {
        *now["curate"]["modules"]
    }


def test_comments_docstrings_and_layout_are_not_code(project: Path) -> None:
    before = state(project)
    (project / "tasks" / "oasst" / "strict_reader.py").write_text(
        '# new\n\ndef walk():\n    """Stroll."""\n    return [ 1 ]\n'
    )
    assert version_guard.stale(state(project), before) == []


def test_a_digest_is_that_of_every_python_that_is_allowed(tmp_path: Path) -> None:
    """`ast.dump` shows other fields in each; the lock is written by one of them and read by all."""
    (tmp_path / "a.py").write_text("def f(a: int | None = None) -> str:\n    return f'{a or 0:<{3}}{f}'\n")
    assert version_guard.digest(tmp_path / "a.py") == "f4c90ead857bb494"


def test_a_raised_version_must_be_locked(project: Path) -> None:
    assert version_guard.stale(state(project, version=2), state(project)) == [
        "parse: version 2 is not locked yet. Run python -m flows lock"
    ]


def test_errors_and_progress_and_the_store_are_guarded_elsewhere() -> None:
    found = {name for entry in version_guard.current(chain.STEPS).values() for name in entry["modules"]}
    assert not {name for name in found if name.startswith(version_guard.LEFT_OUT)}
    assert {"tasks.parse", "tasks.artifacts", "tasks.oasst.strict_reader", "tasks.text.bpe", "tasks.gpt.loop"} <= found
