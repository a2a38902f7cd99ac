"""The HTTP client that files of the hub come through: no header becomes a path, all ends, the token stays at home.

`huggingface_hub` makes a path of an etag and of a commit that a server names, takes a body of any size at any pace,
waits as long as a header says, and sends the token to where the headers of Xet point (2.4, `file_download`, `_xet`).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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

    def sends(request: httpx2.Request) -> None:
        request.headers["Accept-Encoding"] = "identity"  # what is unpacked could be without end
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


class _Stream(httpx2.SyncByteStream):
    """A body that is not larger and not slower than it may be."""

    def __init__(self, response: httpx2.Response, bounds: Bounds, take: Callable[[int], None]) -> None:
        assert isinstance(response.stream, httpx2.SyncByteStream)
        self._inner, self._take, self._bounds = response.stream, take, bounds
        self._most = bounds.size if response.is_success else PAGE
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise Refused("the hub sends the file packed, though it was asked not to")

    def __iter__(self) -> Iterator[bytes]:
        bounds, size, before, since = self._bounds, 0, 0, time.monotonic()
        for piece in self._inner:
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
