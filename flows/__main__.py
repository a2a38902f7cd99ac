"""The command line: python -m flows run | plan | why | ls | show | why-dropped | verify | gc | lock | serve | chat."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

from flows import chain, recipe
from flows.chain import STEP_NAMES
from tasks.artifacts import KINDS, Artifact, Dialogues, Model, Tokens
from tasks.errors import ParameterError, TreelineError
from tasks.step import home, session
from tasks.store import collect
from tasks.store.check import Fault, examine
from tasks.store.folders import SHORT, Store

EXAMPLES = """examples:
  python -m flows run                          the quickstart: offline, on the CPU, some minutes
  python -m flows plan --set encode.block=512  what would run, and why; nothing is run
  python -m flows show dialogues -n 3          three conversations of the youngest dialogues
  python -m flows run gpt2-medium --until encode
  python -m flows chat --prompt "What's the capital of France?"
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    signal.signal(signal.SIGTERM, _terminated)
    logging.getLogger("treeline").addHandler(_to_stderr())
    try:
        asked = parser().parse_args(arguments)
        code: int = asked.command(asked)
    except TreelineError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error[interrupted]: stopped. Finished steps are kept; run the same command to go on.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except Exception as error:  # our own bug, or a library's: one line to read, and the whole story in a file
        print(_unexpected(error), file=sys.stderr)
        return 70
    return code


def _unexpected(error: Exception) -> TreelineError:
    path = home() / ".crash.log"
    with suppress(OSError):
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    first = next(iter(str(error).splitlines()), "")
    return TreelineError(
        f"{type(error).__name__}: {first}",
        f"the traceback is in {path}",
        "finished steps are kept; this is a bug: please report it with that file",
    )


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _to_stderr() -> logging.Handler:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    return handler


def parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    top = argparse.ArgumentParser(
        prog="python -m flows",
        epilog=EXAMPLES,
        description="Treeline turns conversation trees into an instruction-tuned GPT-2; every step is cached.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, does: Callable[[argparse.Namespace], int], about: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        made.set_defaults(command=does)
        return made

    def about_recipe(made: argparse.ArgumentParser) -> None:
        made.add_argument(
            "recipe",
            nargs="?",
            default="quickstart",
            metavar="RECIPE",
            help=f"one of {', '.join(recipe.names())}, or a .toml file (default: quickstart)",
        )
        made.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="SECTION.NAME=VALUE",
            dest="settings",
            help="change a setting, such as train.epochs=2; may be repeated",
        )
        made.add_argument("--until", metavar="STEP", help="stop after this step")
        made.add_argument(
            "--force",
            action="append",
            default=[],
            metavar="STEP",
            help="build this step's artifact anew even if it is there; may be repeated",
        )

    def as_json(made: argparse.ArgumentParser) -> None:
        made.add_argument("--json", action="store_true", help="print JSON for programs")

    made = command("run", run, "run a recipe, doing only what is not done yet")
    about_recipe(made)
    made.add_argument("--tokens", default="", metavar="ID", help="train on these tokens, such as copied ones")
    made.add_argument("--verbose", action="store_true", help="show Prefect's own log, too")
    for name, does, about in (
        ("plan", plan, "say what a run would do, step by step"),
        ("why", why, "say why steps would run"),
    ):
        made = command(name, does, about)
        about_recipe(made)
        as_json(made)
    made = command("ls", ls, "list the artifacts")
    made.add_argument("kind", nargs="?", choices=[*KINDS], metavar="KIND", help=", ".join(KINDS))
    as_json(made)
    made = command("show", show, "look into an artifact")
    made.add_argument("artifact", metavar="ID_OR_KIND", help="an id as `ls` prints it, or a kind for its youngest")
    made.add_argument("-n", type=int, default=5, metavar="N", help="how many rows, trees or sequences (default: 5)")
    as_json(made)
    made = command("why-dropped", why_dropped, "say which rule dropped a message, what it saw, and the twin that stays")
    made.add_argument("message", metavar="MESSAGE_ID", help="as `show` and the report name it")
    made.add_argument("--dialogues", default="dialogues", metavar="ID", help="an id (default: the youngest)")
    as_json(made)
    as_json(command("verify", verify, "hash every file of every artifact again"))
    made = command("gc", gc, "remove artifacts that no recipe's last run needs")
    made.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    made.add_argument("--grace", type=float, default=1.0, metavar="HOURS", help="keep what is younger (default: 1)")
    command("lock", lock, "write the digests of the steps' code into tasks/versions.lock")
    made = command("chat", chat, "talk to a tuned model")
    made.add_argument("--model", default="model", metavar="ID", help="a model's id (default: the youngest)")
    made.add_argument("--prompt", metavar="TEXT", help="answer this and end")
    made.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    made = command("serve", serve, "serve the deployments to the Prefect UI, until interrupted")
    made.add_argument(
        "--port", type=int, default=4200, help="port of the server that it starts, unless PREFECT_API_URL is set"
    )
    return top


def _recipe(asked: argparse.Namespace) -> recipe.Recipe:
    return recipe.load(asked.recipe, asked.settings)


def _force(asked: argparse.Namespace) -> frozenset[str]:
    for name in asked.force:
        chain.until(name)
    return frozenset(asked.force)


def run(asked: argparse.Namespace) -> int:
    """Run a recipe; its last line on standard output is the id of what it ends with."""
    from flows.terminal import console, summary_table

    settings, force, started = _recipe(asked), _force(asked), time.monotonic()
    given: chain.Made = {Tokens: chain.open_tokens(asked.tokens)} if asked.tokens else {}
    steps = chain.until(asked.until, chain.MODEL if given else chain.CHAIN)
    if not steps:
        raise ParameterError(f"nothing is left to do from tokens to {asked.until}", "--until", code="param.step")
    planned = chain.plan(settings, steps, force, given)
    if chain.done(planned):
        made = [(entry.step, True, 0.0, entry.why, entry.artifact) for entry in planned if entry.artifact]
        Store(home()).note_run(settings.name, {step: artifact.id for step, _, _, _, artifact in made})
    else:
        made = _work(settings, asked, force)
    rows = [(step, cached, seconds, why, one.counts, one.path) for step, cached, seconds, why, one in made]
    console().print(summary_table(f"{settings.name}: {time.monotonic() - started:.1f} s", rows))
    print(made[-1][-1].id)
    return 0


def _work(
    settings: recipe.Recipe, asked: argparse.Namespace, force: frozenset[str]
) -> list[tuple[str, bool, float, str, Artifact]]:
    """Run the flow in this process, on Prefect's in-process API unless PREFECT_API_URL names a server."""
    from flows.deployments import configure
    from flows.terminal import Bars
    from tasks.progress import listening

    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "INFO" if asked.verbose else "CRITICAL")
    configure(os.environ)
    print("starting Prefect (the first time, its database takes half a minute) ...", file=sys.stderr)
    from flows.cards import publish_card
    from flows.pipeline import model, pipeline

    bars, until = Bars(), next(step for step in reversed(STEP_NAMES) if step == asked.until or not asked.until)
    forced = [step for step in STEP_NAMES if step in force]
    with bars.shown(), listening(bars), session(settings.name, force, publish_card) as run:
        if asked.tokens:
            model(settings, asked.tokens, until, forced)
        else:
            pipeline(settings, until, forced)
    return [(one.step, one.cached, one.seconds, one.why, one.artifact) for one in run.outcomes]


def plan(asked: argparse.Namespace) -> int:
    """Print what a run would do."""
    from flows.terminal import console, plan_table

    planned = chain.plan(_recipe(asked), chain.until(asked.until), _force(asked))
    if asked.json:
        _json([{"step": one.step, "status": one.status, "key": one.key, "why": one.why} for one in planned])
    else:
        console().print(plan_table(f"{asked.recipe}: what a run would do", planned))
    return 0


def why(asked: argparse.Namespace) -> int:
    """Print why steps would run."""
    planned = [
        one for one in chain.plan(_recipe(asked), chain.until(asked.until), _force(asked)) if one.status != "cached"
    ]
    if asked.json:
        _json([{"step": one.step, "status": one.status, "key": one.key, "why": one.why} for one in planned])
        return 0
    for one in planned:
        print(f"{one.step} would run: {one.why}" if one.status == "run" else f"{one.step} may run: it {one.why}")
    if not planned:
        print("nothing would run: every artifact is there, and nothing changed")
    return 0


def ls(asked: argparse.Namespace) -> int:
    """List the artifacts."""
    from flows.terminal import artifact_table, console, size

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
    else:
        print(f"no artifacts in {home()}; `python -m flows run` makes some")
    return 0


def show(asked: argparse.Namespace) -> int:
    """Show what is inside an artifact."""
    from flows import showing

    artifact = chain.open_artifact(asked.artifact)
    if asked.json:
        _json(showing.rows(artifact, asked.n))
    else:
        print(showing.text(artifact, asked.n))
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
        print("\n".join(showing.verdict(row) for row in found))
    return 0


def verify(asked: argparse.Namespace) -> int:
    """Hash everything again; exit 65 if anything is not what was published."""
    found = [(folder, examine(folder)) for folder in Store(home()).folders()]
    corrupt = [
        {"id": f"{folder.parent.name}/{folder.name}", "file": fault.file, "what": fault.what}
        for folder, fault in found
        if isinstance(fault, Fault)
    ]
    if asked.json:
        _json({"checked": len(found), "corrupt": corrupt})
    else:
        for entry in corrupt:
            print(f"{entry['id']}: {entry['file']} {entry['what']}; the next run moves it aside and rebuilds it")
        print(f"{len(found)} artifacts checked, {len(corrupt)} corrupt")
    return 65 if corrupt else 0


def gc(asked: argparse.Namespace) -> int:
    """Remove what nobody needs, or say what that is."""
    store = Store(home())
    unused = collect.garbage(store, asked.grace * 3600)
    for path in unused:
        print(f"{'would remove' if asked.dry_run else 'removed'} {path.relative_to(store.root)}")
    if not asked.dry_run:
        collect.remove(unused, store)
    print(f"{len(unused)} folders; the last run of each recipe and what is younger than {asked.grace:g} h are kept")
    return 0


def lock(asked: argparse.Namespace) -> int:
    """Write the lock of step versions."""
    from flows import versions

    now = versions.current(chain.CHAIN)
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
        print(piece, end="", flush=True)
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
    print(json.dumps(value, ensure_ascii=False, indent=1))


if __name__ == "__main__":
    sys.exit(main())
