"""Many processes for one piece of work: started, watched, begun again where one is lost, and ended with their parent.

Each process reads its order, one line of JSON, from its standard input, which then stays open: it ends when the parent
does. What it has to say comes back as lines of JSON: progress and log entries of rank 0, errors, the result, that its
part is done, and once a second a sign of life. Nothing that either side reads can be code.

    {"beat": 12}   {"open": ["train", 90, "steps"]}   {"advance": [1, "loss 2.1"]}   {"close": null}
    {"log": [20, "train.plan: ..."]}   {"error": {...}}   {"result": ...}   {"done": null}
"""

from __future__ import annotations

import json
import logging
import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from tasks.errors import RankLost, TreelineError
from tasks.gpt.interrupt import Interrupt, Interrupted
from tasks.progress import Bar, bar

log = logging.getLogger("treeline.train")
TICK = 0.2  # seconds between two looks
AFTERMATH = 1.0  # seconds in which the others may say what they know, when one has ended badly
GRACE = 60.0  # seconds without getting on, once asked to stop, after which nobody is waited for any more
TELL = "TREELINE_TELL"  # the number of the file that a rank tells things through
PARENT = "TREELINE_PARENT"  # the number of the process that it must not outlive
AGAIN = "Run again: it goes on from the last checkpoint; if it is always the same rank, look at its device"
LOOPBACK = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # what ranks of one machine say is nobody else's business


@dataclass
class _Rank:
    """A process, and what is known of it."""

    number: int
    process: subprocess.Popen[bytes]
    ear: IO[bytes]
    half: bytes = b""  # of a line that is still to end
    beats: int = -1
    heard: float = field(default_factory=time.monotonic)
    moved: float = field(default_factory=time.monotonic)
    error: dict[str, Any] | None = None
    done: bool = False  # its part: how it ends is then nobody's business

    @property
    def code(self) -> int | None:
        """The exit code; None while it runs."""
        return self.process.poll()


class _Lost(Exception):
    """A rank has ended or come to a halt, and that was not what it was asked to do."""


def done_by_many(
    command: Sequence[str],
    order: Mapping[str, Any],
    size: int,
    *,
    where: str,
    folder: Path,
    interrupt: Interrupt,
    restarts: int = 2,
    silence: float = 900.0,
    environment: Mapping[str, str] | None = None,
) -> Any:
    """Let many processes do one piece of work, and return the result that rank 0 tells.

    Args:
        command: Starts a process; each is given the same.
        order: JSON values that each of them reads, with `rank`, `size` and `meeting` added.
        size: How many processes.
        where: What they work on, for errors.
        folder: Where they are started.
        interrupt: Asked to stop, all are asked to save and end.
        restarts: How often all begin again, after one was lost.
        silence: Seconds without a sign of life, or without anything begun, after which a process counts as lost.
        environment: Variables added to this process's own.

    Raises:
        TreelineError: The one that a rank has told; `train.rank`, if one was lost too often.
        OSError: What a rank was refused by the system.
        Interrupted: When the interrupt is asked.
    """
    for left in range(restarts, -1, -1):
        with TemporaryDirectory(prefix="treeline-ranks-") as room:
            told = {**order, "size": size, "meeting": f"file://{room}/meeting"}
            try:
                with _Crew(command, folder, told, size, environment or {}, interrupt, silence) as crew:
                    return crew.to_the_end()
            except _Lost as lost:
                if not left:
                    raise RankLost(f"{lost}, and no restart is left", where, AGAIN) from lost
                log.warning("train.rank: %s; all go on from the last checkpoint (restarts left: %d)", lost, left - 1)
    raise AssertionError("the last try returns or raises")


class _Crew:
    """The processes of one try; none of them is left when the block ends."""

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        order: Mapping[str, Any],
        size: int,
        environment: Mapping[str, str],
        interrupt: Interrupt,
        silence: float,
    ) -> None:
        self.interrupt, self.silence = interrupt, silence
        self.eyes, self.shown = selectors.DefaultSelector(), ExitStack()
        self.bars: list[tuple[ExitStack, Bar]] = []
        self.result: list[Any] = []
        self.stopping: float | None = None
        self.warned = False
        self.ranks: list[_Rank] = []
        try:
            for number in range(size):
                self.ranks.append(_started(command, folder, {**order, "rank": number}, number, environment))
                self.eyes.register(self.ranks[-1].ear, selectors.EVENT_READ, self.ranks[-1])
        except BaseException:
            self.end()
            raise

    def __enter__(self) -> _Crew:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()
        for opened, _ in reversed(self.bars):
            opened.close()

    def end(self) -> None:
        """End all processes, at once."""
        for rank in self.ranks:
            if rank.code is None:
                rank.process.kill()
        for rank in self.ranks:
            rank.process.wait()
            rank.ear.close()
            if rank.process.stdin:
                with suppress(BrokenPipeError):  # one that ended before its order left it in the pipe's buffer
                    rank.process.stdin.close()
        self.eyes.close()

    def to_the_end(self) -> Any:
        """Listen until rank 0 tells what it has made, and return that; the others have a moment to end."""
        while not self.result and any(rank.code is None for rank in self.ranks):
            self.listen(TICK)
            self.stop_if_asked()
            if self.stopping is None:
                self.look()
        while self.listen(0):
            pass
        if self.result:  # what anybody does from now on takes nothing from it
            self.until(lambda: all(rank.code is not None for rank in self.ranks))
            return self.result[0]
        if self.stopping is not None:
            raise Interrupted
        self.look()
        raise _Lost(f"rank 0 of {len(self.ranks)} ended without a result")

    def until(self, law: Callable[[], bool]) -> None:
        """Listen until something is so, but no longer than a moment."""
        end = time.monotonic() + AFTERMATH
        while not law() and time.monotonic() < end:
            self.listen(TICK)

    def listen(self, patience: float) -> bool:
        """Take in what the processes say; tell whether there was anything."""
        if not self.eyes.get_map():  # all have closed their mouths, and are about to end
            time.sleep(patience)
            return False
        heard = self.eyes.select(patience)
        for key, _ in heard:
            rank: _Rank = key.data
            said = os.read(rank.ear.fileno(), 1 << 16)
            if not said:
                self.eyes.unregister(rank.ear)
            *lines, rank.half = (rank.half + said).split(b"\n")
            for line in lines:
                self.take(rank, json.loads(line))
        return bool(heard)

    def take(self, rank: _Rank, said: dict[str, Any]) -> None:
        """Do what one line asks for."""
        ((kind, value),) = said.items()
        rank.heard = time.monotonic()
        if kind == "beat" and value != rank.beats:
            rank.beats, rank.moved = value, rank.heard
        elif kind == "error":
            rank.error = rank.error or value
        elif kind == "result":
            self.result.append(value)
        elif kind == "done":
            rank.done = True
        elif kind == "log":
            log.log(*value)
        elif kind == "open":
            opened = ExitStack()
            self.bars.append((opened, opened.enter_context(bar(*value))))
        elif kind == "advance":
            self.bars[-1][1].advance(*value)
        elif kind == "close":
            self.bars.pop()[0].close()

    def stop_if_asked(self) -> None:
        """Ask all to save and end, if somebody wants that; end them if they do not.

        A large model on a slow disk is not cut off while it is saved: who gets on is waited for.
        """
        if self.stopping is None and self.interrupt.asked:
            self.stopping = time.monotonic()
            for rank in self.ranks:
                rank.process.terminate()
        if self.stopping is None:
            return
        now, last = time.monotonic(), max(self.stopping, *(rank.moved for rank in self.ranks))
        if now - last > GRACE or now - self.stopping > max(GRACE, self.silence):
            log.warning("train.rank: asked to stop, not all ranks did in %.0f s: ended", now - self.stopping)
            self.end()
            raise Interrupted
        if now - self.stopping > GRACE and not self.warned:
            self.warned = True
            log.warning("train.rank: asked to stop %g s ago, the ranks are still saving, and waited for", GRACE)

    def look(self) -> None:
        """Raise an error if a process has ended badly or come to a halt."""
        if any(rank.code and not rank.done for rank in self.ranks):
            # The first to be seen need not be the one that began it; and who ended may have been heard only in part.
            self.until(lambda: bool(self.result))
            if self.result or not any(rank.code and not rank.done for rank in self.ranks):
                return
            raise self.reason()
        now = time.monotonic()
        running = [rank for rank in self.ranks if rank.code is None and not rank.done]
        for rank in running:
            if now - rank.heard > self.silence:
                raise _Lost(f"rank {rank.number} of {len(self.ranks)} gave no sign of life for {self.silence:g} s")
        if any(rank.done for rank in self.ranks):
            return  # rank 0 goes on alone, and nobody waits for it but us
        if running and all(now - rank.moved > self.silence for rank in running):
            last = min(running, key=lambda rank: rank.beats)
            raise _Lost(f"rank {last.number} of {len(self.ranks)} got no further for {self.silence:g} s; others wait")

    def reason(self) -> Exception:
        """Say what went wrong first: what we know to be an error, else whoever was killed, else whoever spoke up."""
        blamed = [rank for rank in self.ranks if not rank.done]
        for rank in blamed:
            if rank.error and (known := _known(rank.error)):
                return known
        killed = [rank for rank in blamed if (rank.code or 0) < 0]
        odd = killed or sorted(
            (rank for rank in blamed if rank.code), key=lambda rank: rank.error["at"] if rank.error else 0.0
        )
        rank = odd[0]
        how = f"was killed by {signal.Signals(-(rank.code or 0)).name}" if killed else f"ended with code {rank.code}"
        said = f": {rank.error['what']}" if rank.error else ""
        return _Lost(f"rank {rank.number} of {len(self.ranks)} {how}{said}")


def _started(
    command: Sequence[str], folder: Path, order: Mapping[str, Any], number: int, environment: Mapping[str, str]
) -> _Rank:
    """Start a process, and give it its order."""
    ear, mouth = os.pipe()
    loopback = next((name for _, name in socket.if_nameindex() if name in {"lo", "lo0"}), None)
    own = {name: loopback for name in LOOPBACK if loopback and name not in os.environ}
    variables = {**os.environ, **own, **environment, TELL: str(mouth), PARENT: str(os.getpid())}
    try:
        # A session of its own: at the terminal, Ctrl-C is for the parent alone, who asks all to stop.
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.PIPE, env=variables, pass_fds=[mouth], start_new_session=True
        )
    except BaseException:
        os.close(ear)
        raise
    finally:
        os.close(mouth)
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(order).encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it has ended already, and its exit code will be looked at
    return _Rank(number, process, os.fdopen(ear, "rb", buffering=0))


def error_said(error: Exception) -> dict[str, Any]:
    """Return an error as JSON values."""
    said: dict[str, Any] = {"at": time.time(), "what": f"{type(error).__name__}: {error}".splitlines()[0][:500]}
    if isinstance(error, TreelineError):
        said |= {"kind": type(error).__name__, "parts": [error.what, error.where, error.do, error.code]}
    elif isinstance(error, OSError) and error.errno:
        said |= {"kind": "OSError", "parts": [error.errno, error.strerror, error.filename and str(error.filename)]}
    return said


def _known(said: Mapping[str, Any]) -> Exception | None:
    """Return the error that a rank told, if it is one that another try would only meet again."""
    if said.get("kind") == "OSError":
        return OSError(*said["parts"])
    waiting: list[type[TreelineError]] = [TreelineError]
    while waiting:
        kind = waiting.pop()
        if kind.__name__ == said.get("kind"):
            return kind(*said["parts"])
        waiting += kind.__subclasses__()
    return None
