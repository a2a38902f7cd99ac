"""The HTTP client that files of the hub come through: no header becomes a path, all ends, the token stays at home.

`huggingface_hub` makes a path of an etag and of a commit that a server names, takes a body of any size at any pace,
waits as long as a header says, and sends the token to where the headers of Xet point (2.4, `file_download`, `_xet`).
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import httpx2
from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils._http import default_client_factory

# What a header must look like whose value becomes part of a path: a sha256 or a git hash; a commit.
PATHS = {
    "ETag": re.compile(r'(?:W/)?"?(?:[0-9a-f]{40}|[0-9a-f]{64})"?'),
    "X-Linked-Etag": re.compile(r'(?:W/)?"?(?:[0-9a-f]{40}|[0-9a-f]{64})"?'),
    "X-Repo-Commit": re.compile(r"[0-9a-f]{40}"),
}
WAITS = ("Retry-After", "ratelimit")  # a wait that a header asks for may be without end; our own pauses are not
PAGE = 1 << 20  # bytes of an answer that is no file: an error, a redirect
OVER = 4  # times that a transfer may start over, in bytes of the file


class Refused(Exception):
    """What a server sends is too much, too slow, or in a form that was not asked for."""


@dataclass(frozen=True)
class Bounds:
    """What a transfer may ask of us.

    Attributes:
        size: Bytes of the file at most.
        least_rate: Bytes a second at least, in each window.
        window_s: Seconds in which they are counted.
    """

    size: int
    least_rate: float
    window_s: float


@contextmanager
def bounded(home: str, bounds: Bounds) -> Iterator[None]:
    """Let the hub's client connect within bounds while the block runs, and send the token to `home` alone.

    Args:
        home: Address of the hub: scheme, host and port count.
        bounds: Of all that comes in the block, together.
    """
    left = bounds.size * OVER
    own = _origin(httpx2.URL(home))
    head = _Head(bounds.window_s)

    def sends(request: httpx2.Request) -> None:
        request.headers["Accept-Encoding"] = "identity"  # what is unpacked could be without end
        request.headers["Connection"] = "close"  # so that the connection opened last is the one in use
        request.extensions = {**request.extensions, "trace": head.trace}
        if _origin(request.url) != own:
            request.headers.pop("Authorization", None)

    def receives(response: httpx2.Response) -> None:
        for name, form in PATHS.items():
            if not form.fullmatch(response.headers.get(name, "")):
                response.headers.pop(name, None)
        for name in WAITS:
            response.headers.pop(name, None)
        response.stream = _Stream(response, bounds, take)

    def take(size: int) -> None:
        nonlocal left
        left -= size
        if left < 0:
            raise Refused("the hub starts the file over, again and again")

    def client() -> httpx2.Client:
        made: httpx2.Client = default_client_factory()
        made.event_hooks = {"request": [*made.event_hooks["request"], sends], "response": [receives]}
        return made

    xet, constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET, True  # it has connections of its own
    set_client_factory(client)
    try:
        yield
    finally:
        set_client_factory(default_client_factory)
        constants.HF_HUB_DISABLE_XET = xet


def _origin(url: httpx2.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


class _Head:
    """Ends a connection on which the head of an answer does not come in time: a byte at a time, it never times out."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._socket, self._timer = seconds, None, threading.Timer(0, lambda: None)

    def trace(self, event: str, told: Mapping[str, Any]) -> None:
        """Follow what happens; source: the `trace` extension of httpcore."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self._socket = told["return_value"].get_extra_info("socket")
        elif event == "http11.receive_response_headers.started":
            self._timer = threading.Timer(self._seconds, self._end)
            self._timer.daemon = True
            self._timer.start()
        elif event.startswith("http11.receive_response_headers."):
            self._timer.cancel()

    def _end(self) -> None:
        if self._socket is not None:
            with suppress(OSError):  # it has ended by itself
                self._socket.shutdown(socket.SHUT_RDWR)


def _nothing(_: int) -> None: ...


class _Stream(httpx2.SyncByteStream):
    """A body that is not larger and not slower than it may be."""

    def __init__(self, response: httpx2.Response, bounds: Bounds, take: Callable[[int], None]) -> None:
        assert isinstance(response.stream, httpx2.SyncByteStream)
        self._inner, self._bounds = response.stream, bounds
        self._most = bounds.size if response.is_success else PAGE
        self._take = take if response.is_success else _nothing
        self._packed = response.is_success and response.headers.get("Content-Encoding", "identity") != "identity"

    def __iter__(self) -> Iterator[bytes]:
        bounds, size, before, since = self._bounds, 0, 0, time.monotonic()
        for piece in self._inner:
            if self._packed:
                raise Refused("the hub sends the file packed, though it was asked not to")
            size += len(piece)
            self._take(len(piece))
            if size > self._most:
                raise Refused(f"the hub sends more than {self._most:,} bytes")
            if (now := time.monotonic()) - since > bounds.window_s:
                if size - before < bounds.least_rate * bounds.window_s:
                    raise Refused(f"the hub sends less than {bounds.least_rate:,.0f} bytes a second")
                before, since = size, now
            yield piece

    def close(self) -> None:
        self._inner.close()
