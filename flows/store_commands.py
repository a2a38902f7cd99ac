"""The commands that look into the store and keep it: each prints, and returns its exit code."""

from __future__ import annotations

import argparse
import fnmatch
import logging
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from flows import chain
from flows.terminal import artifact_table, console, print_json, size
from tasks.artifacts import Artifact, Dialogues, Model
from tasks.errors import ParameterError
from tasks.lookup import seen
from tasks.report.markdown import printable
from tasks.step import home
from tasks.store import collect
from tasks.store.store import SHORT, Store


def ls(asked: argparse.Namespace) -> int:
    """List the artifacts."""
    found = [manifest for _, manifest in Store(home()).manifests(asked.kind)]
    if asked.json:
        print_json(
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
    else:
        print(f"no artifacts in {home()}; `python -m flows run` makes some")
    _say_passed_over(Store(home()))
    return 0


def _say_passed_over(store: Store) -> None:
    for line in store.passed_over():
        print(f"passed over: {line}", file=sys.stderr)


def show(asked: argparse.Namespace) -> int:
    """Show what is inside an artifact."""
    from flows import views

    artifact = seen(Artifact, asked.artifact)
    if asked.aside:
        rows = views.aside(artifact, asked.aside, asked.n)
        told = [artifact.id, *map(views.aside_line, rows)]
        print_json(rows) if asked.json else print(printable("\n".join(told)))
    elif asked.json:
        print_json(views.rows(artifact, asked.n))
    else:
        print(printable(views.text(artifact, asked.n)))  # it is strangers' text: no escape reaches the terminal
    return 0


def export(asked: argparse.Namespace) -> int:
    """Write an artifact for another program; the last line is the folder."""
    from flows import exporting

    counts = exporting.export(asked.form, seen(Artifact, asked.artifact), asked.folder)
    print(", ".join(f"{split} {count:,}" for split, count in counts.items()))
    print(asked.folder)
    return 0


def why_dropped(asked: argparse.Namespace) -> int:
    """Print what curation decided about a message, and about those that its evidence names."""
    from flows import views

    dialogues = seen(Dialogues, asked.dialogues, "--dialogues")
    found = views.verdicts(dialogues, asked.message)
    if not found:
        raise ParameterError(
            f"no message {asked.message!r} in {dialogues.id}",
            hint="`python -m flows show messages --json` lists ids; a bad line's messages are in rejected.parquet; "
            "--dialogues ID looks into others",
            code="param.message",
        )
    if asked.json:
        print_json(found)
    else:
        print(printable("\n".join([f"in {dialogues.id}", *map(views.verdict, found)])))
    return 0


def verify(asked: argparse.Namespace) -> int:
    """Hash everything again; exit 65 if anything is not what was published."""
    store = Store(home())
    folders = store.folders()
    corrupt = [
        {"id": f"{folder.parent.name}/{folder.name}", "file": fault.file, "what": fault.what}
        for folder in folders
        for fault in store.verify(folder)
    ]
    corrupt += [{"id": kind, "file": "", "what": "is a link: nothing behind it is used"} for kind in store.links()]
    if asked.json:
        print_json({"checked": len(folders), "corrupt": corrupt})
    else:
        for entry in corrupt:
            print(f"{entry['id']}: {entry['file']} {entry['what']}")
        if corrupt:
            print("the next run moves aside what was altered and rebuilds it; what was added, or is a link, stays")
        print(f"{len(folders)} artifacts checked, {len(corrupt)} corrupt")
    return 65 if corrupt else 0


def gc(asked: argparse.Namespace) -> int:
    """Remove what nobody needs, or say what that is."""
    store = Store(home())
    forgotten = sorted({name for pattern in asked.forget for name in _runs_like(store, pattern)})
    unused = collect.garbage(store, asked.grace * 3600, forgotten=forgotten)
    if not asked.dry_run:
        store.forget(forgotten)
        collect.remove(unused, store)
    for name in forgotten:
        print(f"{'would forget' if asked.dry_run else 'forgot'} the last run of {name}")
    for path in unused:
        print(f"{'would remove' if asked.dry_run else 'removed'} {path.relative_to(store.root)}")
    kept = f"the last run of each recipe and what is younger than {asked.grace:g} h are kept"
    print(f"{len(unused)} folders and files; {kept}")
    _say_passed_over(store)
    return 0


def _runs_like(store: Store, pattern: str) -> list[str]:
    """List the noted runs that a pattern names.

    Raises:
        ParameterError: If there are none: a slip of the finger must not look like success.
    """
    known = store.runs()
    found = fnmatch.filter(known, pattern)
    if not found:
        what = f"no last run of a recipe named {pattern!r} is noted"
        hint = f"Noted are {', '.join(known[:16])}{', ...' if len(known) > 16 else ''}" if known else ""
        raise ParameterError(what, "--forget", hint, code="param.run")
    return found


def lock(asked: argparse.Namespace) -> int:
    """Write the lock of step versions."""
    from flows import version_guard

    now = version_guard.current(chain.STEPS)
    for line in version_guard.stale(now, version_guard.locked()):
        print(line)
    version_guard.write(now)
    print("locked " + ", ".join(f"{name} {entry['version']}" for name, entry in now.items()))
    return 0


def chat(asked: argparse.Namespace) -> int:
    """Talk to a tuned model: one answer, or a conversation until an empty line."""
    model = seen(Model, asked.model, "--model")
    from tasks.gpt.chat_session import ChatSession

    talk = ChatSession(model.path, asked.temperature)
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
    from flows import server

    server.configure(os.environ)
    logging.raiseExceptions = False  # else Prefect prints two lines for each log that it cannot send at the end
    print("starting the Prefect server ...", file=sys.stderr)
    ours = not os.environ.get("PREFECT_API_URL")
    with server.for_serve(asked.port) as api:
        from flows import deployments

        page = api.removesuffix("/api")
        print(f"the UI is at {page}; artifacts at {page}/v2/artifacts", flush=True)
        if ours:
            deployments.close_lost()
            print(f"its password is the line in {server.folder() / 'auth'}")
            print('for the `prefect` command: eval "$(python -m flows env)"', flush=True)
        deployments.serve()
    return 0


def env(asked: argparse.Namespace) -> int:
    """Print what a shell needs to reach the server of the `serve` that runs."""
    from flows import server

    for name, value in server.exports().items():
        print(f"export {name}={shlex.quote(value)}")
    return 0
