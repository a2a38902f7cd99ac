"""The command line: python -m flows run | plan | why | ls | show | why-dropped | export | verify | ..."""

from __future__ import annotations

import argparse
import logging
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from flows import recipe, run_commands, store_commands
from tasks.artifacts import KINDS
from tasks.errors import ParameterError, TreelineError
from tasks.step import home

AGAIN = 10.0  # seconds after which a signal that ended nothing is sent again; telling Prefect takes up to eight

EXAMPLES = """examples:
  python -m flows run                          the quickstart: offline, on the CPU, some minutes
  python -m flows plan --set encode.context_length=512  what would run, and why; nothing is run
  python -m flows show dialogues -n 3          three conversations of the last run's dialogues
  python -m flows run gpt2-medium --until encode
  python -m flows chat --prompt "What's the capital of France?"
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    stop = _Stop()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    logging.getLogger("treeline").addHandler(_to_stderr())
    logging.getLogger("treeline.train").setLevel(logging.INFO)  # what a run will need, said before it takes its time
    try:
        asked = parser().parse_args(arguments)
        code: int = asked.command(asked)
    except TreelineError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error[interrupted]: stopped. Finished steps are kept; run the same command to go on.", file=sys.stderr)
        return 130
    except SystemExit as stopped:  # `--help` ends so, too
        if stopped.code == 128 + signal.SIGTERM:
            print(
                "error[terminated]: stopped by SIGTERM. Finished steps are kept; run the same command to go on.",
                file=sys.stderr,
            )
        raise
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except Exception as error:  # our own bug, or a library's: one line to read, and the whole story in a file
        print(_unexpected(error), file=sys.stderr)
        return 70
    finally:
        stop.over()
    return code


def _unexpected(error: Exception) -> TreelineError:
    path, first = home() / ".crash.log", next(iter(str(error).splitlines()), "")
    where = f"the traceback is in {path}"
    try:
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    except OSError:
        where = "".join(traceback.format_tb(error.__traceback__)[-1:]).strip().splitlines()[0]
    return TreelineError(
        f"{type(error).__name__}: {first}",
        where,
        "finished steps are kept; this is a bug: please report it with that file",
    )


class _Stop:
    """Ends the command at a signal; again, should that be swallowed, as by a `__del__` while a library is imported.

    A signal that follows soon changes nothing: raised in the midst of an end, it would cut that off with a traceback.
    """

    def __init__(self) -> None:
        self.again: list[threading.Timer] = []
        self.last = -math.inf

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if time.monotonic() - self.last < AGAIN / 2:
            return
        self.last = time.monotonic()
        self.again.append(threading.Timer(AGAIN, os.kill, (os.getpid(), number)))
        self.again[-1].daemon = True
        self.again[-1].start()
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    def over(self) -> None:
        """Send nothing any more: the command has ended, and what is left may be cut off."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        for timer in self.again:
            timer.cancel()


def _to_stderr() -> logging.Handler:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    return handler


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ParameterError(message, self.prog, f"see `{self.prog} --help`", code="param.usage")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, found {text!r}")
    return int(text)


def _seeds(text: str) -> int:
    count = _count(text)
    if not 1 <= count <= 100:
        raise argparse.ArgumentTypeError(f"expected 1 to 100 seeds, found {text!r}")
    return count


def _hours(text: str) -> float:
    try:
        hours = float(text)
    except ValueError:
        hours = math.nan
    if not 0 <= hours < math.inf:
        raise argparse.ArgumentTypeError(f"expected hours from 0, found {text!r}")
    return hours


Does = Callable[[argparse.Namespace], int]
Command = Callable[[str, Does, str], argparse.ArgumentParser]  # name, what it does, a line about it


def parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    top = _Parser(
        prog="python -m flows",
        epilog=EXAMPLES,
        description="Treeline turns conversation trees into an instruction-tuned GPT-2; every step is cached.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, does: Does, about: str) -> argparse.ArgumentParser:
        made = known.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        made.set_defaults(command=does)
        return made

    _add_runs(command)
    _add_looks(command)
    _add_upkeep(command)
    return top


def _add_runs(command: Command) -> None:
    made = command("run", run_commands.run, "run a recipe, doing only what is not done yet")
    _about_recipe(made)
    made.add_argument("--verbose", action="store_true", help="show Prefect's own log, too")
    made = command("sweep", run_commands.sweep, "train one model for each value of some settings, and compare them")
    _recipe(made)
    _settings(made, "what is varied, such as train.lr=1e-5,3e-5,1e-4; may be repeated")
    made.add_argument("--seeds", type=_seeds, default=1, metavar="N", help="seeds that each arm is trained from (1)")
    made.add_argument("--verbose", action="store_true", help="show Prefect's own log, too")
    _as_json(made)
    for name, does, about in (
        ("plan", run_commands.plan, "say what a run would do, step by step"),
        ("why", run_commands.why, "say why steps would run"),
    ):
        made = command(name, does, about)
        _about_recipe(made)
        _as_json(made)


def _add_looks(command: Command) -> None:
    made = command("ls", store_commands.ls, "list the artifacts")
    made.add_argument("kind", nargs="?", choices=[*KINDS], metavar="KIND", help=", ".join(KINDS))
    _as_json(made)
    made = command("show", store_commands.show, "look into an artifact")
    made.add_argument("artifact", metavar="ID_OR_KIND", help="an id as `ls` prints it, or a kind: the last run's")
    made.add_argument("-n", type=_count, default=5, metavar="N", help="how many rows, trees or sequences (default: 5)")
    for which, about in (("rejected", "of messages: lines that could not be read"), ("dropped", "of dialogues")):
        made.add_argument(f"--{which}", action="store_const", const=which, dest="aside", help=about)
    _as_json(made)
    made = command(
        "why-dropped",
        store_commands.why_dropped,
        "say which rule dropped a message, what it saw, and the twin that stays",
    )
    made.add_argument("message", metavar="MESSAGE_ID", help="as `show` and the report name it")
    made.add_argument("--dialogues", default="dialogues", metavar="ID", help="an id (default: the last run's)")
    _as_json(made)
    made = command("export", store_commands.export, "write an artifact into a new folder, for another program")
    made.add_argument(
        "form",
        choices=("nanogpt", "messages", "adapter"),
        metavar="FORM",
        help="nanogpt (of tokens), messages (of dialogues), adapter (of a model: LoRA and the base that it lies over)",
    )
    made.add_argument("artifact", metavar="ID_OR_KIND", help="an id as `ls` prints it, or a kind: the last run's")
    made.add_argument("folder", type=Path, metavar="DIR", help="a folder that is not there yet, or is empty")


def _add_upkeep(command: Command) -> None:
    _as_json(command("verify", store_commands.verify, "hash every file of every artifact again"))
    made = command("gc", store_commands.gc, "remove artifacts that no recipe's last run needs")
    made.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    made.add_argument("--grace", type=_hours, default=1.0, metavar="HOURS", help="keep what is younger (default: 1)")
    made.add_argument(
        "--forget",
        action="append",
        default=[],
        metavar="RECIPE",
        help="keep nothing for this recipe's last run, such as quickstart-* for the arms of sweeps; may be repeated",
    )
    command("lock", store_commands.lock, "write the digests of the steps' code into tasks/versions.lock")
    made = command("chat", store_commands.chat, "talk to a tuned model")
    made.add_argument("--model", default="model", metavar="ID", help="a model's id (default: the last run's)")
    made.add_argument("--prompt", metavar="TEXT", help="answer this and end")
    made.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    made = command("serve", store_commands.serve, "serve the deployments to the Prefect UI, until interrupted")
    made.add_argument(
        "--port", type=int, default=4200, help="port of the server that it starts, unless PREFECT_API_URL is set"
    )
    command("env", store_commands.env, "print the variables with which `prefect` reaches the server that `serve` runs")


def _recipe(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "recipe",
        nargs="?",
        default="quickstart",
        metavar="RECIPE",
        help=f"one of {', '.join(recipe.names())}, or a .toml file (default: quickstart)",
    )


def _settings(made: argparse.ArgumentParser, about: str) -> None:
    made.add_argument("--set", action="append", default=[], metavar="SECTION.NAME=VALUE", dest="settings", help=about)


def _about_settings(made: argparse.ArgumentParser) -> None:
    _recipe(made)
    _settings(made, "change a setting, such as train.epochs=2; may be repeated")
    made.add_argument("--tokens", default="", metavar="ID", help="begin with these tokens, such as copied ones")
    made.add_argument(
        "--preference-groups", default="", metavar="ID", help="with --tokens and preferences: these preference groups"
    )


def _about_recipe(made: argparse.ArgumentParser) -> None:
    _about_settings(made)
    made.add_argument("--until", metavar="STEP", help="stop after this step")
    made.add_argument(
        "--force",
        action="append",
        default=[],
        metavar="STEP",
        help="build this step's artifact anew even if it is there; may be repeated",
    )


def _as_json(made: argparse.ArgumentParser) -> None:
    made.add_argument("--json", action="store_true", help="print JSON for programs")


if __name__ == "__main__":
    sys.exit(main())
