"""The READMEs say what is there: commands, options, settings, paths, variables, markers and defaults that they name."""

import argparse
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from pydantic import BaseModel

from flows.__main__ import parser
from flows.recipe import Recipe, load
from tasks.artifacts import KINDS

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "artifacts/README.md", "flows/**/README.md", "tasks/**/README.md", "tests/**/README.md")
READMES = sorted(path for page in PAGES for path in ROOT.glob(page))
MOST_BYTES = 9_000  # of the first page: what a stranger reads before he decides to go on
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
VARIABLE = re.compile(r"TREELINE_[A-Z]+(?:_[A-Z]+)*")
PATH = re.compile(r"(?:flows|tasks|tests|artifacts/README\.md|\.ci)(?:/[\w./-]*)?|[\w.-]+\.(?:toml|yaml|txt)")
PLACEHOLDER = re.compile(r"NAME|mine\.toml")  # of a file that the reader writes
FILES = {"py", "bin", "json", "jsonl", "md", "parquet"}  # what comes after the dot of a file, not of a section

name = pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))


def spans(text: str) -> list[str]:
    """Return what stands in backticks within lines, each on one line."""
    return [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", FENCE.sub("", text))]


def code(text: str) -> Iterator[str]:
    """Yield every piece of code: what stands in backticks, and the lines of fenced blocks without their comments."""
    yield from spans(text)
    for block in FENCE.findall(text):
        yield from (re.split(r"\s#\s", line)[0].strip() for line in block.splitlines()[1:-1])


def subcommands() -> dict[str, argparse.ArgumentParser]:
    (found,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    return {**found.choices}


def invocations(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each command of ours that a text names, and the options that it gives it."""
    for line in code(text):
        for called in re.findall(r"-m flows ([^|&;)]+)", line):
            command, *words = shlex.split(re.sub(r"[\[\]]|\.\.\.", " ", called))
            yield command, [word.split("=")[0] for word in words if word.startswith("-")]


def field(names: list[str]) -> bool:
    """Tell whether the recipe has a setting of this name; of a step also one of `runtime`, as `--set` takes it."""
    model: type[BaseModel] = Recipe
    for at, part in enumerate(names):
        if part not in model.model_fields:
            short = at == 1 and names[0] in Recipe.model_fields["runtime"].default.__class__.model_fields
            return short and field(["runtime", *names])
        inner = model.model_fields[part].default
        if not isinstance(inner, BaseModel):
            return at == len(names) - 1
        model = type(inner)
    return True


def settings(text: str) -> Iterator[list[str]]:
    """Yield each `section.name` that a text names in code."""
    sections = "|".join(part for part in Recipe.model_fields if part != "name")
    for line in code(text):
        for found in re.findall(rf"(?<![\w./-])(?:{sections})(?:\.[a-z_0-9]+)+", line):
            parts = found.split(".")
            if parts[-1] not in FILES:
                yield parts


@name
def test_every_command_exists_with_the_options_named(readme: Path) -> None:
    known = subcommands()
    for command, options in invocations(readme.read_text(encoding="utf-8")):
        assert command == "COMMAND" or command in known, f"python -m flows {command}"
        if command in known:
            unknown = {*options} - {*known[command]._option_string_actions}
            assert not unknown, f"python -m flows {command} {unknown}"


def test_the_first_page_lists_every_command() -> None:
    listed = {command for command, _ in invocations((ROOT / "README.md").read_text(encoding="utf-8"))}
    assert {*subcommands()} == listed | {"why"}


@name
def test_every_setting_exists(readme: Path) -> None:
    unknown = [".".join(parts) for parts in settings(readme.read_text(encoding="utf-8")) if not field(parts)]
    assert not unknown


@name
def test_every_path_exists(readme: Path) -> None:
    """Paths stand as seen from the checkout; links as seen from the page."""
    text = readme.read_text(encoding="utf-8")
    named = [span for span in spans(text) if PATH.fullmatch(span) and not PLACEHOLDER.search(span)]
    assert not [path for path in named if not (ROOT / path).exists()]
    assert not [link for link in LINK.findall(text) if not target(readme, link)]


def target(readme: Path, link: str) -> bool:
    """Tell whether a link leads to a file and, where it names one, to a heading of it."""
    path, _, anchor = link.partition("#")
    page = readme.parent / path if path else readme
    if not page.exists() or not anchor:
        return page.exists()
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_variable_that_is_read_is_named_and_every_one_named_is_read() -> None:
    sources = [*ROOT.glob("flows/**/*.py"), *ROOT.glob("tasks/**/*.py"), *ROOT.glob("tests/bench/*.py")]
    read, named = (
        {found for path in paths for found in VARIABLE.findall(path.read_text(encoding="utf-8"))}
        for paths in (sources, READMES)
    )
    assert named == read


def test_the_first_page_is_short_and_begins_with_the_test_command_that_ci_runs() -> None:
    page = (ROOT / "README.md").read_bytes()
    assert len(page) <= MOST_BYTES
    first = next(line for line in page.decode().splitlines() if "python -m pytest" in line)
    assert first.startswith("python3 -m venv .venv && ")
    assert first.endswith(" && .venv/bin/python -m pytest")


def rows(text: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table under a heading, without its head."""
    _, _, below = text.partition(f"\n{heading}\n")
    assert below, f"no heading {heading}"
    table = re.search(r"(?:^\|.*\n)+", below, re.MULTILINE)
    assert table
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table[0].splitlines()[2:]]


def test_the_markers_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    declared = [marker.split(": ", 1) for marker in project["tool"]["pytest"]["ini_options"]["markers"]]
    page = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    assert [[marker.strip("`"), about] for marker, about in rows(page, "## Markers")] == declared


def test_the_rules_and_their_defaults_are_those_of_curation() -> None:
    page = (ROOT / "tasks" / "dialogue" / "README.md").read_text(encoding="utf-8")
    table, defaults = rows(page, "## Rules"), load("quickstart").curate.__class__().model_dump(mode="json")
    defaults |= {f"label_limits.{rule}": limit for rule, limit in defaults["label_limits"].items()}
    said = [rule for first, *_ in table for rule in re.sub(r"\(.*?\)", "", first).replace(" ", "").split(",")]
    assert {*defaults["rules"]} <= {*said}
    for cell in (row[-1] for row in table):
        for setting in re.findall(r"`([^`]+)`", cell):
            key, equals, value = (part.strip() for part in setting.partition("="))
            if key.startswith("["):
                continue
            assert key in defaults, key
            assert not equals or json.loads(value) == defaults[key], setting


def test_every_kind_of_artifact_and_its_files_are_named() -> None:
    page = (ROOT / "artifacts" / "README.md").read_text(encoding="utf-8")
    table = {first.strip("`"): files for first, _, files in rows(page, "## Artifacts")}
    assert {*table} == {*KINDS}
    assert not [
        (kind, file) for kind, made in KINDS.items() for file in (*made.files, *made.optional)
        if kind != "raw" and f"`{file}`" not in table[kind]
        and not (kind == "groups" and file.endswith(".bin"))
    ]  # fmt: skip


def test_every_folder_of_the_code_has_a_line_in_the_tree() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    _, _, below = page.partition("\n## The tree\n")
    lines = FENCE.findall(below)[0].splitlines()[1:-1]
    tops = [at for at, line in enumerate(lines) if not line.startswith(" ")] + [len(lines)]
    drawn = {
        f"{lines[top].split('/')[0]}/{line.split('/')[0].strip()}"
        for top, end in pairwise(tops)
        for line in lines[top + 1 : end]
    }
    there = {
        str(folder.relative_to(ROOT))
        for top in ("flows", "tasks")
        for folder in (ROOT / top).iterdir()
        if folder.is_dir() and any(path.suffix != ".pyc" for path in folder.rglob("*") if path.is_file())
    }
    assert there == drawn
