"""Prefect servers that only this user can reach: one that `serve` keeps, and one for as long as a `run` takes.

Whoever can ask a Prefect server can run any command as the user who serves. So both want a password, answer the
loopback's names and their own page only (`flows/server_app.py`), and get their socket from us: nobody else can have
bound the port that the password is sent to.
"""

from __future__ import annotations

import base64
import fcntl
import http.client
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from flows.child_process import tied
from tasks.errors import ParameterError, PermissionRefused, UnavailableError
from tasks.step import home
from tasks.store.disk import writing

HOSTS = ("127.0.0.1", "localhost")
ERROR = "treeline-error: "  # how a line of the server's log begins that tells an error in a line
# Seconds; a server that has ended is noticed at once. 6 s were measured, and 60 on a machine at a load of 14.
START_TIME = 300.0
ANSWER_TIME = 10.0  # seconds that a server which runs already may take to say that it does


def configure(environment: MutableMapping[str, str]) -> None:
    """Give Prefect and OpenMP their settings, where the user has not; what is written from now on is the user's alone.

    Raises:
        StoreError: If the store cannot be written, which would show as a thousand lines of a database's traceback.
        PermissionRefused: If the system denies it.
    """
    defaults = {
        "PREFECT_HOME": str(home() / ".prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "treeline",
        # On busy cores OpenMP's threads wait by spinning: 560 tokens/s in place of 9,300 were measured on two vCPUs.
        "OMP_WAIT_POLICY": "PASSIVE",
        "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",  # never unpickle what lies in a folder
    }
    for name, value in defaults.items():
        environment.setdefault(name, value)
    os.umask(0o077)
    folder = Path(environment["PREFECT_HOME"])
    with writing(home()):
        folder.mkdir(parents=True, exist_ok=True)  # Prefect makes no parents
        with tempfile.TemporaryFile(dir=folder):
            pass
        _make_private(home(), folder, *folder.iterdir(), *home().glob(".*.log"))


def _make_private(*paths: Path) -> None:
    """Take from others what older versions let them read, where it is ours to take."""
    for path in paths:
        found = path.lstat()
        if found.st_uid == os.geteuid() and found.st_mode & 0o077 and not path.is_symlink():
            path.chmod(found.st_mode & 0o700)


def folder() -> Path:
    """Return where Prefect keeps its database, and we the password and the address that is served."""
    return Path(os.environ.get("PREFECT_HOME") or home() / ".prefect")


def password() -> str:
    """Return the text that opens the servers, made at the first use and kept in a file that only the user can read."""
    if given := os.environ.get("PREFECT_SERVER_API_AUTH_STRING"):
        return given
    path = folder() / "auth"
    if not path.exists():
        with writing(home()):
            new = path.with_name(f".auth.{secrets.token_hex(4)}")
            new.touch(mode=0o600)
            new.write_text(f"admin:{secrets.token_urlsafe(24)}")
            try:
                os.link(new, path)  # whoever comes second takes what the first has made
            except FileExistsError:
                pass
            finally:
                new.unlink()
    return path.read_text().strip()


class Server:
    """A Prefect server that runs, and what it says."""

    def __init__(self, page: str, child: subprocess.Popen[bytes], log: Path, mode: str) -> None:
        self.page, self.api, self.child, self.log = page, f"{page}/api", child, log
        self.watched, self.cause, self.said = False, "", set[str]()
        self.died: Callable[[], None] = lambda: None
        self.reader = threading.Thread(target=self._read, args=[log.open(mode)], daemon=True)
        self.reader.start()

    def wait(self) -> None:
        """Wait until it answers.

        Raises:
            UnavailableError: If it ends, or does not answer in time.
        """
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        if _ask(f"{self.api}/health", START_TIME, direct) is None:
            self.end()
            what = f"the Prefect server did not start: {self.cause or 'it said nothing'}"
            raise UnavailableError(what, str(self.log), "Read its log", code="prefect.start")
        self.watched = True

    def end(self) -> None:
        """End it; nothing that a run needs is in it alone."""
        self.watched = False
        self.child.terminate()
        try:
            self.child.wait(15)
        except subprocess.TimeoutExpired:
            self.child.kill()
        self.reader.join()

    def _read(self, log: IO[bytes]) -> None:
        """Keep what the server says; say an error once a kind, and its end if nobody asked for that."""
        assert self.child.stdout is not None
        with log, self.child.stdout as said:
            for line in said:
                log.write(line)
                log.flush()
                self._say(line.decode(errors="replace").strip())
        code = self.child.wait()
        if self.watched:
            how = f"signal {-code}" if code < 0 else f"code {code}"
            hint = "Start it again; a run that was under way goes on from its last checkpoint"
            error = UnavailableError(f"the Prefect server has ended ({how})", str(self.log), hint, code="prefect.ended")
            sys.stderr.write(f"{error}\n")
            self.died()

    def _say(self, line: str) -> None:
        error, kind = line.removeprefix(ERROR), re.sub(r"\d+", "", line)
        if error == line or kind in self.said:
            return
        self.said.add(kind)
        self.cause = self.cause or error
        if self.watched:
            told = UnavailableError(f"the Prefect server says: {error}", str(self.log), code="prefect.server")
            sys.stderr.write(f"{told}\n")


@contextmanager
def started(log: Path, mode: str, port: int = 0, settings: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Run a server, and point this process's Prefect to it; it may not answer yet.

    Args:
        log: File that takes what it says.
        mode: How that is opened: "ab" or "wb".
        port: Where it listens on the loopback; 0: where there is room.
        settings: More variables for it.

    Raises:
        ParameterError: If the port is taken.
    """
    secret = password()
    with socket.socket() as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((HOSTS[0], port))
        except (OSError, OverflowError) as error:
            what = f"port {port} of this machine cannot be had: {getattr(error, 'strerror', None) or error}"
            raise ParameterError(what, "--port", "Take another", code="serve.port") from error
        bound.listen(128)
        page = f"http://{HOSTS[0]}:{bound.getsockname()[1]}"
        own = {
            "PREFECT_SERVER_API_HOST": HOSTS[0],
            "PREFECT_SERVER_API_PORT": str(bound.getsockname()[1]),
            "PREFECT_SERVER_API_AUTH_STRING": secret,
            "PREFECT_SERVER_UI_API_URL": f"{page}/api",
            "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(folder() / "ui"),  # else it writes to where Prefect is installed
            "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": page,
            "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        }
        child = tied(
            ["flows.server_app", str(bound.fileno())],
            env={**os.environ, **own, **(settings or {})},
            pass_fds=[bound.fileno()],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    server = Server(page, child, log, mode)
    direct = ",".join(filter(None, [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), HOSTS[0]]))
    os.environ.update(no_proxy=direct, NO_PROXY=direct)  # a proxy would be told the password
    os.environ.update(PREFECT_API_URL=server.api, PREFECT_API_AUTH_STRING=secret)
    try:
        yield server
    finally:
        server.end()


@contextmanager
def for_run() -> Iterator[Callable[[], None]]:
    """Run a server for the block, unless PREFECT_API_URL names one; yield what waits until it answers.

    It has a database of its own, and neither UI nor schedules. It starts while Prefect is imported.
    """
    if given := os.environ.get("PREFECT_API_URL"):
        _demand(given)
        yield lambda: None
        return
    place = folder() / "run"
    place.mkdir(exist_ok=True)
    for name in [name for name in os.environ if name.startswith(("PREFECT_SERVER_DATABASE_", "PREFECT_API_DATABASE_"))]:
        del os.environ[name]  # the one of `serve`
    small = {
        "PREFECT_HOME": str(place),
        "PREFECT__SERVER_EPHEMERAL": "1",
        "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
        "PREFECT_SERVER_UI_ENABLED": "false",
    }
    with (place / "starting").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two that make the database at once would fail
        with started(place / "server.log", "wb", settings=small) as server:

            def wait() -> None:
                server.wait()
                fcntl.flock(lock, fcntl.LOCK_UN)

            yield wait


@contextmanager
def for_serve(port: int) -> Iterator[str]:
    """Run the server that `serve` keeps, unless PREFECT_API_URL names one; yield the API's address.

    Should our server end first, so does this process, at once, with 69: Prefect's runner would go on asking it. The
    runs notice, and save what they have.

    Raises:
        UnavailableError: If none answers, or another `serve` runs on this store.
    """
    if given := os.environ.get("PREFECT_API_URL"):
        _demand(given)
        yield given
        return
    with (folder() / "serving").open("a+") as address:
        try:
            fcntl.flock(address, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UnavailableError(
                "`serve` runs already for this store", _served(), "Use that", "serve.twice"
            ) from error
        address.truncate(0)
        with started(home() / ".server.log", "ab", port) as server:
            server.wait()
            server.died = lambda: os._exit(UnavailableError.exit_code)
            address.write(server.api)
            address.flush()
            yield server.api


def _served() -> str:
    return (folder() / "serving").read_text()


def exports() -> dict[str, str]:
    """Return the variables with which Prefect's own command line reaches the server of the `serve` that runs.

    Raises:
        UnavailableError: If none runs for this store.
    """
    try:
        with (folder() / "serving").open() as address:
            fcntl.flock(address, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:  # held by who serves; another could listen at the address of one that was killed
        if api := _served():
            return {"PREFECT_API_URL": api, "PREFECT_API_AUTH_STRING": password()}
    except FileNotFoundError:
        pass
    raise UnavailableError(
        "no `serve` runs for this store", str(home()), "Start it by `python -m flows serve`", code="env.serve"
    )


def _demand(api: str) -> None:
    """Refuse an address, set by the user, where no server answers, or one that does not know us.

    Raises:
        UnavailableError: If none answers.
        PermissionRefused: If it wants another password.
    """
    parts = urllib.parse.urlsplit(api)
    user, _, host = parts.netloc.rpartition("@")
    shown = parts._replace(netloc=host).geturl()
    code = _ask(f"{shown}/version", ANSWER_TIME, urllib.request.build_opener(), _authorization(user))
    if code is None:
        raise UnavailableError(
            f"no Prefect server answers at {shown}",
            "PREFECT_API_URL",
            "Start it or correct the address; unset, a server is started for you",
            code="prefect.unreachable",
        )
    if code in {401, 403}:
        raise PermissionRefused(
            f"the Prefect server at {shown} wants another password",
            "PREFECT_API_AUTH_STRING",
            "For the server that `serve` runs, `python -m flows env` prints it",
            code="prefect.password",
        )


def _authorization(user: str) -> dict[str, str]:
    """Return the header with which Prefect's client would log in; `user` is what stands before the host."""
    if key := os.environ.get("PREFECT_API_KEY"):
        return {"Authorization": f"Bearer {key}"}
    if given := os.environ.get("PREFECT_API_AUTH_STRING") or urllib.parse.unquote(user):
        return {"Authorization": "Basic " + base64.b64encode(given.encode()).decode()}
    return {}


def _ask(
    url: str, patience: float, opener: urllib.request.OpenerDirector, headers: Mapping[str, str] | None = None
) -> int | None:
    """Return the status that answers a request within some seconds; None if nothing does."""
    try:
        with opener.open(urllib.request.Request(url, headers=dict(headers or {})), timeout=patience) as answer:  # noqa: S310
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError, http.client.HTTPException):
        return None
