"""The commands of the command line: each takes what was asked, prints, and returns its exit code."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flows import chain, recipe
from flows.chain import STEP_NAMES
from tasks.artifacts import Artifact, Dialogues, Model
from tasks.dialogue.markdown import printable
from tasks.errors import ParameterError, PermissionRefused, StoreError
from tasks.step import Step, home, session
from tasks.store import collect, parts
from tasks.store.check import Fault, examine
from tasks.store.folders import SHORT, Store
from tasks.together import in_torchrun


@dataclass(frozen=True)
class _Wanted:
    """What `run`, `plan` and `why` are asked about."""

    recipe: recipe.Recipe
    steps: tuple[Step[Any, Any], ...]
    force: frozenset[str]
    given: chain.Made

    def plan(self) -> list[chain.Planned]:
        return chain.plan(self.recipe, self.steps, self.force, self.given)


def _wanted(asked: argparse.Namespace) -> _Wanted:
    settings = recipe.load(asked.recipe, asked.settings)
    given = chain.encoded(settings, asked.tokens, asked.contests) if asked.tokens else {}
    steps = chain.until(asked.until, chain.model(settings) if given else chain.whole(settings))
    names = {step.name for step in steps}
    odd = [name for name in (*asked.force, asked.until) if name and chain.until(name) and name not in names]
    if odd or not steps:
        what = f"--force {odd[0]}" if odd and odd[0] in asked.force else f"--until {asked.until}"
        raise ParameterError(
            f"{what} names a step that is not among those to run",
            "the command line",
            "see `plan` with the same arguments for what is",
            code="param.step",
        )
    return _Wanted(settings, steps, frozenset(asked.force), given)


def run(asked: argparse.Namespace) -> int:
    """Run a recipe; its last line on standard output is the id of what it ends with."""
    with in_torchrun() as leads:  # as all but rank 0 of torchrun's processes, nothing is left to do afterwards
        return _run(asked) if leads else 0


def _run(asked: argparse.Namespace) -> int:
    from flows.terminal import asked_of_texts, console, summary_table

    wanted, started = _wanted(asked), time.monotonic()
    planned = wanted.plan()
    if chain.done(planned):
        made = [(entry.step, True, 0.0, entry.why, entry.artifact) for entry in planned if entry.artifact]
        with suppress(StoreError, PermissionRefused):  # a store that cannot be written needs no protection from `gc`
            Store(home()).note_run(wanted.recipe.name, {step: artifact.id for step, _, _, _, artifact in made})
    else:
        made = _work(wanted, asked)
    rows = [(step, cached, seconds, why, one.counts, one.path) for step, cached, seconds, why, one in made]
    console().print(summary_table(f"{wanted.recipe.name}: {time.monotonic() - started:.1f} s", rows))
    for step, cached, *_, one in made:
        for line in [] if cached else asked_of_texts(one.manifest):
            console().print(f"{step}: {line}", highlight=False)
    print(made[-1][-1].id)
    return 0


def sweep(asked: argparse.Namespace) -> int:
    """Run the arms of a sweep, and print the table that compares them."""
    with in_torchrun() as leads:
        return _sweep(asked) if leads else 0


def _sweep(asked: argparse.Namespace) -> int:
    from flows import sweep as sweeps
    from flows.terminal import console, table

    base = recipe.load(asked.recipe)
    planned = sweeps.arms(base, asked.settings, asked.seeds)
    if (outcomes := sweeps.done(base, planned)) is None:
        _prefect(asked.verbose)
        from flows.pipeline import sweep_arms

        with _in_process():
            sweep_arms(base, asked.settings, asked.seeds)
        if (outcomes := sweeps.done(base, planned)) is None:
            raise StoreError("an arm's artifact is gone", str(home()), "run it again", code="sweep.gone")
    rows = sweeps.comparison(outcomes)
    if asked.json:
        _json(rows)
    else:
        console().print(table(f"sweep of {base.name}", sweeps.COLUMNS, [sweeps.cells(row) for row in rows]))
    return 0


def _work(wanted: _Wanted, asked: argparse.Namespace) -> list[tuple[str, bool, float, str, Artifact]]:
    """Run the flow in this process, on Prefect's in-process API unless PREFECT_API_URL names a server."""
    _prefect(asked.verbose)
    from flows.cards import publish_card
    from flows.pipeline import model, pipeline

    until = next(step for step in reversed(STEP_NAMES) if step == asked.until or not asked.until)
    forced = [step for step in STEP_NAMES if step in wanted.force]
    with _in_process(), session(wanted.recipe.name, wanted.force, publish_card) as run:
        if asked.tokens:
            model(wanted.recipe, asked.tokens, until, forced, asked.contests)
        else:
            pipeline(wanted.recipe, until, forced)
    return [(one.step, one.cached, one.seconds, one.why, one.artifact) for one in run.outcomes]


def _prefect(verbose: bool) -> None:
    """Set Prefect's environment; its modules read it once, when they are imported."""
    from flows.deployments import configure

    for name in ("PREFECT_LOGGING_LEVEL", "PREFECT_INTERNAL_LOGGING_LEVEL", "PREFECT_SERVER_LOGGING_LEVEL"):
        os.environ.setdefault(name, "INFO" if verbose else "CRITICAL")
    configure(os.environ)
    print("starting Prefect (the first time, its database takes half a minute) ...", file=sys.stderr)


@contextmanager
def _in_process() -> Iterator[None]:
    """Show bars while flows run in this process, and keep Ctrl-C from Prefect's own server."""
    from flows.deployments import server_apart
    from flows.terminal import Bars
    from tasks.progress import listening

    bars = Bars()
    server_apart()
    with bars.shown(), listening(bars):
        yield


def plan(asked: argparse.Namespace) -> int:
    """Print what a run would do."""
    from flows.terminal import console, plan_table

    planned = _wanted(asked).plan()
    if asked.json:
        _json([{"step": one.step, "status": one.status, "key": one.key, "why": one.why} for one in planned])
    else:
        console().print(plan_table(f"{asked.recipe}: what a run would do", planned))
    return 0


def why(asked: argparse.Namespace) -> int:
    """Print why steps would run."""
    planned = [one for one in _wanted(asked).plan() if one.status != "cached"]
    if asked.json:
        _json([{"step": one.step, "status": one.status, "key": one.key, "why": one.why} for one in planned])
        return 0
    for one in planned:
        print(f"{one.step} would run: {one.why}" if one.status == "run" else f"{one.step} may run: it {one.why}")
    if not planned:
        print("nothing would run: every artifact is there, and nothing changed")
    return 0


def verify_resume(asked: argparse.Namespace) -> int:
    """Kill training at some points, resume it, and compare with the uninterrupted run; 1 if anything differs."""
    from flows.resuming import trials
    from flows.terminal import Bars, console, resume_table
    from tasks.progress import listening

    settings, bars = recipe.load(asked.recipe, asked.settings), Bars()
    tokens = chain.tokens_of(settings, asked.tokens)
    with TemporaryDirectory(prefix="treeline-resume-", dir=asked.scratch) as scratch, bars.shown(), listening(bars):
        found = trials(tokens, settings.train, settings.runtime.train, max(1, asked.points), Path(scratch))
    if asked.json:
        _json([asdict(one) for one in found])
    else:
        console().print(resume_table(f"{settings.name}: killed, resumed, compared with the uninterrupted run", found))
    return 0 if all(one.same for one in found) else 1


def ls(asked: argparse.Namespace) -> int:
    """List the artifacts."""
    from flows.terminal import artifact_table, console, remembered, size

    found = [manifest for _, manifest in Store(home()).manifests(asked.kind)]
    if asked.json:
        _json(
            [
                {
                    "id": f"{one.kind}/{one.key[:SHORT]}",
                    "kind": one.kind,
                    "key": one.key,
                    "created": one.created,
                    "bytes": size(one),
                    "counts": one.counts,
                    "recipe": one.recipe,
                }
                for one in found
            ]
        )
    elif found:
        console().print(artifact_table(found))
        for line in remembered(parts.memos(home())):
            print(line)
    else:
        print(f"no artifacts in {home()}; `python -m flows run` makes some")
    return 0


def show(asked: argparse.Namespace) -> int:
    """Show what is inside an artifact."""
    from flows import showing

    artifact = chain.open_artifact(asked.artifact)
    if asked.aside:
        rows = showing.aside(artifact, asked.aside, asked.n)
        _json(rows) if asked.json else print(printable("\n".join(map(showing.aside_line, rows))))
    elif asked.json:
        _json(showing.rows(artifact, asked.n))
    else:
        print(printable(showing.text(artifact, asked.n)))  # it is strangers' text: no escape reaches the terminal
    return 0


def export(asked: argparse.Namespace) -> int:
    """Write an artifact for another program; the last line is the folder."""
    from flows import exporting

    counts = exporting.export(asked.form, chain.open_artifact(asked.artifact), asked.folder)
    print(", ".join(f"{split} {count:,}" for split, count in counts.items()))
    print(asked.folder)
    return 0


def why_dropped(asked: argparse.Namespace) -> int:
    """Print what curation decided about a message, and about those that its evidence names."""
    from flows import showing

    dialogues = chain.open_artifact(asked.dialogues)
    if not isinstance(dialogues, Dialogues):
        raise ParameterError(
            f"expected the id of dialogues, found {dialogues.id}", "--dialogues", code="param.artifact"
        )
    found = showing.verdicts(dialogues, asked.message)
    if not found:
        raise ParameterError(
            f"no message {asked.message!r} in {dialogues.id}",
            do="`python -m flows show messages --json` lists ids; a bad line's messages are in rejected.parquet",
            code="param.message",
        )
    if asked.json:
        _json(found)
    else:
        print(printable("\n".join(showing.verdict(row) for row in found)))
    return 0


def verify(asked: argparse.Namespace) -> int:
    """Hash everything again; exit 65 if anything is not what was published."""
    found = [(folder, examine(folder)) for folder in Store(home()).folders()]
    corrupt = [
        {"id": f"{folder.parent.name}/{folder.name}", "file": fault.file, "what": fault.what}
        for folder, fault in found
        if isinstance(fault, Fault)
    ]
    written = [part for folder in parts.memos(home()) for part in parts.parts(folder)]
    faults = [(part, what) for part in written if (what := parts.fault(part)) and part.exists()]
    corrupt += [{"id": f"{parts.FOLDER}/{part.parent.name}", "file": part.name, "what": what} for part, what in faults]
    if asked.json:
        _json({"checked": len(found), "remembered": len(written), "corrupt": corrupt})
    else:
        for entry in corrupt:
            print(f"{entry['id']}: {entry['file']} {entry['what']}; the next run moves it aside and rebuilds it")
        print(f"{len(found)} artifacts and {len(written)} parts of what is remembered checked, {len(corrupt)} corrupt")
    return 65 if corrupt else 0


def gc(asked: argparse.Namespace) -> int:
    """Remove what nobody needs, or say what that is."""
    store = Store(home())
    unused = collect.garbage(store, asked.grace * 3600)
    if not asked.dry_run:
        collect.remove(unused, store)
    for path in unused:
        print(f"{'would remove' if asked.dry_run else 'removed'} {path.relative_to(store.root)}")
    print(f"{len(unused)} folders; the last run of each recipe and what is younger than {asked.grace:g} h are kept")
    return 0


def lock(asked: argparse.Namespace) -> int:
    """Write the lock of step versions."""
    from flows import versions

    now = versions.current(chain.STEPS)
    for line in versions.stale(now, versions.locked()):
        print(line)
    versions.write(now)
    print("locked " + ", ".join(f"{name} {entry['version']}" for name, entry in now.items()))
    return 0


def chat(asked: argparse.Namespace) -> int:
    """Talk to a tuned model: one answer, or a conversation until an empty line."""
    model = chain.open_artifact(asked.model)
    if not isinstance(model, Model):
        raise ParameterError(f"expected a model's id, found {model.id}", "--model", code="param.artifact")
    from tasks.gpt.talk import Talk

    talk = Talk(model.path, asked.temperature)
    if asked.prompt is not None:
        _answer(talk.answer(asked.prompt))
        return 0
    print(f"{model.id}; an empty line ends", file=sys.stderr)
    with _quiet_end():
        while text := input("you> ").strip():
            _answer(talk.answer(text))
    return 0


def _answer(pieces: Iterator[str]) -> None:
    for piece in pieces:
        print(printable(piece), end="", flush=True)
    print()


@contextmanager
def _quiet_end() -> Iterator[None]:
    try:
        yield
    except EOFError:
        print()


def serve(asked: argparse.Namespace) -> int:
    """Serve the deployments until interrupted."""
    from flows.deployments import configure, deployments, server

    configure(os.environ)
    print("starting the Prefect server ...", file=sys.stderr)
    with server(asked.port) as api:
        from prefect import serve as prefect_serve

        print(f"the UI is at {api.removesuffix('/api')}; artifacts at {api.removesuffix('/api')}/v2/artifacts")
        prefect_serve(*deployments(), limit=1)
    return 0


def _json(value: Any) -> None:
    from flows.terminal import json_text

    print(json_text(value, sys.stdout.isatty()))
