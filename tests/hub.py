"""A small server on the loopback that speaks the Hugging Face hub's protocol for files, and fails on command.

It knows what the client's downloads use: HEAD and GET of `/{repo}/resolve/{revision}/{file}` and the same under
`/datasets/`, the headers X-Repo-Commit, ETag, X-Linked-Etag and X-Linked-Size, the redirect of a large file to another
host (here: `localhost` instead of `127.0.0.1`), Range, tokens, and the error codes.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import unquote

REVISION = "a" * 40


def git_hash(data: bytes) -> str:
    """Return what git calls a blob of these bytes; the hub's etag of a small file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@dataclass
class Hosted:
    """A file on the hub: its bytes, and what the hub says of them."""

    data: bytes
    etag: str
    large: bool
    commit: str


@dataclass(frozen=True)
class Request:
    """A request that came in."""

    method: str
    path: str
    range: str | None
    token: str | None


class Hub:
    """The server; `with Hub() as hub:` starts and ends it."""

    def __init__(self) -> None:
        self.files: dict[str, Hosted] = {}
        self.requests: list[Request] = []
        self.token: str | None = None  # set: needed to read anything
        self.gated = False
        self.faults: list[tuple[str, int]] = []  # (method, status), used up from the front
        self.cuts: list[int] = []  # bytes after which the next bodies end early
        self.lies: dict[str, str] = {}  # headers that stand in place of the true ones, in every answer
        self.page = b""  # what stands in an answer that is no file
        self.head: Callable[[Callable[[bytes], object]], None] | None = None  # sends the answers, from their first byte
        self.body: Callable[[Callable[[bytes], object]], None] | None = None  # sends the bodies: without an end, slowly
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        """The address to put into HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def add(
        self,
        repo: str,
        file: str,
        data: bytes,
        revision: str = REVISION,
        repo_type: str = "model",
        large: bool = True,
        etag: str | None = None,
        commit: str | None = None,
    ) -> str:
        """Publish a file and return its sha256; a large one (LFS) lies on another host and has that as its etag."""
        sha256 = hashlib.sha256(data).hexdigest()
        prefix = "datasets/" if repo_type == "dataset" else ""
        served = etag if etag is not None else sha256 if large else git_hash(data)
        hosted = Hosted(data, served, large, commit or revision)
        self.files[f"/{prefix}{repo}/resolve/{revision}/{file}"] = hosted
        return sha256

    def fail(self, status: int, times: int = 1, method: str = "HEAD") -> None:
        """Answer the next requests of a method with an error."""
        self.faults += [(method, status)] * times

    def bodies(self) -> list[Request]:
        """Return the requests that asked for a file's content (a redirect to it is not one)."""
        return [request for request in self.requests if request.method == "GET"]

    def _handler(hub) -> type[BaseHTTPRequestHandler]:  # `self` is the handler's
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.answer()

            def do_GET(self) -> None:
                self.answer()

            def log_message(self, format: str, *args: object) -> None: ...

            def answer(self) -> None:
                path, authorization = unquote(self.path), self.headers.get("Authorization")
                token = authorization.removeprefix("Bearer ") if authorization else None
                hub.requests.append(Request(self.command, path, self.headers.get("Range"), token))
                if hub.head:
                    self.close_connection = True
                    with suppress(OSError):
                        hub.head(self.wfile.write)
                    return None
                if hub.faults and hub.faults[0][0] == self.command:
                    return self.say(hub.faults.pop(0)[1])
                if path.startswith("/cdn/"):
                    return self.send(next(f for f in hub.files.values() if path == f"/cdn/{_name(f)}"))
                if hub.token is not None and token != hub.token:
                    return self.say(401)
                if hub.gated:
                    return self.say(403, {"X-Error-Code": "GatedRepo"})
                found = hub.files.get(path)
                if found is None:
                    return self.say(404, {"X-Error-Code": _missing(hub.files, path)})
                if not found.large:
                    return self.send(found)
                port = hub.url.rsplit(":", 1)[1]
                linked = {"X-Linked-Etag": f'"{found.etag}"', "X-Linked-Size": str(len(found.data))}
                location = {"Location": f"http://localhost:{port}/cdn/{_name(found)}"}
                return self.say(302, {**linked, **location, "X-Repo-Commit": found.commit})

            def say(self, status: int, headers: dict[str, str] | None = None) -> None:
                page = hub.page if self.command == "GET" else b""
                self.send_response(status)
                for name, value in {"Content-Length": str(len(page)), **(headers or {}), **hub.lies}.items():
                    self.send_header(name, value)
                self.end_headers()
                with suppress(OSError):
                    self.wfile.write(page)

            def send(self, hosted: Hosted) -> None:
                asked = self.headers.get("Range")
                start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
                body, whole = hosted.data[start:], len(hosted.data)
                ranged = {"Content-Range": f"bytes {start}-{whole - 1}/{whole}"} if asked else {}
                named = {"ETag": f'"{hosted.etag}"', "X-Repo-Commit": hosted.commit}
                self.send_response(206 if asked else 200)
                for name, value in {"Content-Length": str(len(body)), **ranged, **named, **hub.lies}.items():
                    if value:
                        self.send_header(name, value)
                self.end_headers()
                if self.command == "HEAD":
                    return
                if hub.body:
                    self.close_connection = True
                    with suppress(OSError):  # the reader has had enough
                        hub.body(self.wfile.write)
                    return
                if hub.cuts:
                    body, self.close_connection = body[: hub.cuts.pop(0)], True
                self.wfile.write(body)

        return Handler


def _name(hosted: Hosted) -> str:
    return hashlib.sha256(hosted.data).hexdigest()


def _missing(files: dict[str, Hosted], path: str) -> str:
    """Say which part of an address is unknown, as the hub does in X-Error-Code."""
    repo, _, rest = path.partition("/resolve/")
    revision = rest.split("/")[0]
    if not any(known.startswith(f"{repo}/resolve/") for known in files):
        return "RepoNotFound"
    known = any(name.startswith(f"{repo}/resolve/{revision}/") for name in files)
    return "EntryNotFound" if known else "RevisionNotFound"
