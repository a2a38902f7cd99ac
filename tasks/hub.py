"""The hub: fetch one pinned file through `huggingface_hub` and its cache, and believe nothing but the hash.

The client resumes a cut transfer by itself, within one call: when it gives up, or its process dies, it keeps nothing,
since a shared partial file breaks where locks do nothing (huggingface_hub 2.4, `_download_to_tmp_and_move`), and the
next try starts over. It checks no content: a cached file that was cut or altered later is returned as good, and a
finished transfer is checked for its size alone. So every use of a file is verified here: against the pinned sha256 or,
where there is none, against the hub's etag, which is the sha256 of a large file and the git hash of a small one.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from tasks.errors import (
    ConfigurationError,
    InputError,
    PermissionRefused,
    SourceChanged,
    StoreError,
    TreelineError,
    UnavailableError,
)
from tasks.progress import Bar, bar

T = TypeVar("T")
RepoType = Literal["dataset", "model"]
PIECE = 1 << 20  # bytes read at once
LONGEST_PAUSE = 30.0  # seconds
AGAIN = frozenset({408, 425, 429})  # with all 5xx: statuses that another try may cure


@dataclass(frozen=True)
class Patience:
    """What a service may ask of us: how often it is asked again, how slow it may be, and how much it may send.

    Attributes:
        retries: Tries after the first one.
        backoff_s: Seconds before the first of them; doubles each time, up to half a minute.
        least_rate: Bytes a second that a transfer must bring, in each window.
        window_s: Seconds of such a window.
        most: Bytes of a file whose size is not pinned.
    """

    retries: int = 4
    backoff_s: float = 1.0
    least_rate: float = 1000.0
    window_s: float = 30.0
    most: int = 16 << 30


PATIENT = Patience()


@dataclass(frozen=True)
class _Wanted:
    """A file of the hub, and what it must have: digest (sha256 or git hash) and size; None where not known yet."""

    repo: str
    file: str
    revision: str
    repo_type: RepoType
    digest: str | None
    size: int | None

    @property
    def where(self) -> str:
        return f"{self.file} of {self.repo_type} {self.repo} at {self.revision} on {urlsplit(_endpoint()).hostname}"

    def hub_names(self) -> dict[str, Any]:
        """Return what the client's functions call these."""
        names = {"repo_id": self.repo, "filename": self.file, "revision": self.revision, "repo_type": self.repo_type}
        return {**names, "cache_dir": _cache()} if _cache() else names


def fetch_file(
    repo: str,
    file: str,
    revision: str,
    sha256: str | None = None,
    *,
    repo_type: RepoType = "model",
    size: int | None = None,
    patience: Patience = PATIENT,
) -> Path:
    """Return the path of a pinned file in the hub's cache, fetched if need be and verified in any case.

    `$HF_ENDPOINT`, `$HF_HUB_CACHE` and `$HF_TOKEN` are read at each call. A verified copy in the cache is used without
    asking the hub. A damaged one is fetched anew, once; then a wrong hash is an error.

    Args:
        repo: Repository id, such as `openai-community/gpt2`.
        file: Path inside the repository.
        revision: Commit, 40 hex digits; never a branch.
        sha256: Of the content, 64 hex digits; None trusts the hub's etag for this revision.
        repo_type: `model` or `dataset`.
        size: Of the content, in bytes; None: at most what `patience` allows.
        patience: How often to ask again, how slow an answer may be, and how large.

    Raises:
        SourceChanged: If the bytes are not the pinned ones.
        InputError: `source.missing`, if the hub has no such repository, revision or file.
        PermissionRefused: `source.denied`, if the hub wants another token, or one at all.
        UnavailableError: `source.unavailable`, if the hub did not answer, or out of all bounds, and the cache has no
            good copy.
    """
    wanted = _Wanted(repo, file, revision, repo_type, sha256, size)
    kept = _cached(wanted)
    if kept is not None and (digest := sha256 or _etag(kept)) and _digest(kept, digest) == digest:
        return kept
    wanted = _agreed(wanted, _insist(partial(_look_up, wanted), wanted, patience), patience.most)
    digest, found, path = wanted.digest or "", "", Path()
    for force in [True] if kept else [False, True]:  # what a first download leaves may come from a damaged cache
        path = _insist(partial(_download, wanted, force), wanted, patience)
        found = _digest(path, digest)
        if found == digest:
            return path
    raise _changed(wanted, f"{_kind(digest)} {digest}", f"{found} ({path.stat().st_size:,} bytes)")


def read_pieces(path: Path, label: str) -> Iterator[bytes]:
    """Yield a file's content in pieces, with a progress bar in bytes."""
    with path.open("rb") as file, bar(label, path.stat().st_size, "bytes") as shown:
        while piece := file.read(PIECE):
            yield piece
            shown.advance(len(piece))


def _endpoint() -> str:
    # The client reads $HF_ENDPOINT once, at its import; a served flow may set it later.
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def _cache() -> Path | None:
    """Return the folder of `$HF_HUB_CACHE`; None leaves it to the client."""
    named = os.environ.get("HF_HUB_CACHE")
    return Path(os.path.expandvars(named)).expanduser() if named else None


def _cached(wanted: _Wanted) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(**wanted.hub_names())
    return Path(found) if isinstance(found, str) else None


def _etag(cached: Path) -> str | None:
    """Return the etag under which the hub served a cached file: the name of the blob that the cache links to."""
    name = cached.readlink().name if cached.is_symlink() else ""
    return name if _kind(name) else None


def _kind(digest: str) -> str:
    """Say which hash a string of hex digits is; empty for none."""
    if not re.fullmatch("[0-9a-f]+", digest):
        return ""
    return {64: "sha256", 40: "git hash"}.get(len(digest), "")


def _digest(path: Path, like: str) -> str:
    """Hash a file the way `like` was made: sha256, or git's hash of a blob."""
    made = hashlib.sha256()
    if _kind(like) == "git hash":
        made = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    for piece in read_pieces(path, "verify"):
        made.update(piece)
    return made.hexdigest()


def _look_up(wanted: _Wanted) -> Any:
    """Ask the hub for the file's commit, etag and size."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    names = {name: value for name, value in wanted.hub_names().items() if name != "cache_dir"}
    return get_hf_file_metadata(hf_hub_url(**names, endpoint=_endpoint()), endpoint=_endpoint())


def _agreed(wanted: _Wanted, published: Any, most: int) -> _Wanted:
    """Return the file with the digest and size that it must have, if the hub's answer does not speak against them."""
    etag, size = published.etag or "", published.size
    if published.commit_hash not in (None, wanted.revision):
        raise _changed(wanted, f"revision {wanted.revision}", str(published.commit_hash))
    if not _kind(etag):
        raise InputError(
            "expected an etag that is a sha256 or a git hash, found none",
            wanted.where,
            "Ask another hub (HF_ENDPOINT), or read a file at hand with source = file",
            "source.unpinned",
        )
    if wanted.digest and _kind(etag) == "sha256" and etag != wanted.digest:  # known before a byte is transferred
        raise _changed(wanted, f"sha256 {wanted.digest}", f"{etag} ({size or 0:,} bytes)")
    if wanted.size and size not in (None, wanted.size):
        raise _changed(wanted, f"{wanted.size:,} bytes", f"{size:,}")
    if size and size > most and not wanted.size:
        raise _unavailable(
            f"the hub says that the file has {size:,} bytes; at most {most:,} are taken (max_download_gb)", wanted
        )
    return replace(wanted, digest=wanted.digest or etag, size=wanted.size or size)


def _changed(wanted: _Wanted, expected: str, found: str) -> SourceChanged:
    hint = "Find out why the file changed; if the new one is meant, pin its revision and sha256"
    return SourceChanged(f"expected {expected}, found {found}", wanted.where, hint)


def _download(wanted: _Wanted, force: bool) -> Path:
    from huggingface_hub import hf_hub_download

    with bar("download", wanted.size, "bytes") as shown:
        names = wanted.hub_names()
        return Path(hf_hub_download(**names, endpoint=_endpoint(), force_download=force, tqdm_class=_relay(shown)))


def _relay(shown: Bar) -> type:
    """Return a class that looks like tqdm to the client and hands what it is told to our own bar."""

    class Relay:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def __enter__(self) -> Relay:
            return self

        def __exit__(self, *_: object) -> None: ...

        def update(self, amount: float = 1) -> None:
            shown.advance(amount)  # negative where the client starts over

        def ignore(self, *_: Any, **__: Any) -> None: ...

        # Bytes on the wire are not bytes of the file (deduplication), and its speed is the listener's business.
        update_transfer = set_postfix_str = set_transfer_postfix_str = close = ignore

    return Relay


def _insist(call: Callable[[], T], wanted: _Wanted, patience: Patience) -> T:
    """Call within bounds until it works, the error is final, or patience ends."""
    from tasks.client import Bounds, bounded

    bounds = Bounds(wanted.size or patience.most, patience.least_rate, patience.window_s)
    for tried in range(patience.retries + 1):
        try:
            with bounded(_endpoint(), bounds):
                return call()
        except Exception as error:
            refusal = _refusal(error, wanted)
            if refusal is None and tried == patience.retries:
                refusal = _unavailable(f"{_cause(error)}, tried {tried + 1} times", wanted)
            if refusal is error:
                raise
            if refusal is not None:
                # `from None`: the client's own texts may quote signed addresses and headers.
                raise refusal from None
        time.sleep(min(patience.backoff_s * 2**tried, LONGEST_PAUSE))
    raise AssertionError("unreachable")


def _root_of(error: Exception) -> Exception:
    """Return what the client wrapped into 'not in the cache' or 'force download failed'."""
    from huggingface_hub.errors import HfHubHTTPError

    cause = error.__cause__
    wrapped = isinstance(error, FileNotFoundError | ValueError) and not isinstance(error, HfHubHTTPError)
    return _root_of(cause) if wrapped and isinstance(cause, Exception) else error


def _cause(error: Exception) -> str:
    """Say in a few words what went wrong on the way to the hub; never quote an answer or a header."""
    import httpx2

    root = _root_of(error)
    status = getattr(getattr(root, "response", None), "status_code", None)
    if status is not None:
        return f"the hub answered {status}"
    network = isinstance(root, httpx2.NetworkError | httpx2.TimeoutException)
    return f"{type(root).__name__}{f' ({root})' if network and str(root) else ''}"


def _refusal(error: Exception, wanted: _Wanted) -> Exception | None:
    """Return the error to raise at once: one of ours, or `error` itself where it is a bug; None: worth another try."""
    import httpx2
    from huggingface_hub import errors

    from tasks.client import Refused

    root = _root_of(error)
    if isinstance(root, TreelineError):
        return root
    if isinstance(root, Refused):
        return _unavailable(str(root), wanted)
    if isinstance(root, errors.HfHubHTTPError):
        return _refusal_of_status(root.response.status_code, root, wanted)
    if isinstance(root, errors.OfflineModeIsEnabled):
        return _unavailable("the hub is switched off by HF_HUB_OFFLINE", wanted)
    malformed = (httpx2.LocalProtocolError, httpx2.UnsupportedProtocol, httpx2.InvalidURL, UnicodeEncodeError)
    if isinstance(root, malformed):  # their texts and attributes hold the header with the token
        return ConfigurationError("the request cannot be sent", wanted.where, "Check HF_ENDPOINT and HF_TOKEN")
    if isinstance(root, httpx2.RequestError) or str(root).startswith("Consistency check failed"):
        return None
    if isinstance(root, errors.FileMetadataError | ValueError | OverflowError):  # of headers that make no sense
        return _unavailable("what answered does not speak the hub's protocol", wanted)
    if isinstance(root, OSError) and root.errno is not None:
        reason, cache = root.strerror, _cache() or "its default place"
        return StoreError(
            f"cannot write the hub's cache: {reason}", f"{cache}", "Free space there or set HF_HUB_CACHE", "store.write"
        )
    return error


def _refusal_of_status(status: int, error: Exception, wanted: _Wanted) -> TreelineError | None:
    if status in AGAIN or status >= 500:
        return None
    if status in (401, 403):
        token = "HF_TOKEN is set, but does not open it" if os.environ.get("HF_TOKEN") else "HF_TOKEN is not set"
        what = f"the hub answered {status}: it is gated, private or does not exist, and {token}"
        hint = "Check the name; accept the conditions on the hub's page; put a token with read access into HF_TOKEN"
        return PermissionRefused(what, wanted.where, hint, "source.denied")
    if status in (404, 410):
        missing = {"RepositoryNotFoundError": "repository", "RevisionNotFoundError": "revision"}
        what = f"the hub has no such {missing.get(type(error).__name__, 'file')} (status {status})"
        return InputError(what, wanted.where, "Check repo, file and revision", "source.missing")
    return _unavailable(f"the hub answered {status}", wanted)


def _unavailable(what: str, wanted: _Wanted) -> UnavailableError:
    kept = _cached(wanted)
    where = wanted.where + (
        f"; the copy in the cache, {kept}, is not the pinned one" if kept else "; nothing in the cache"
    )
    return UnavailableError(
        what, where, "Check the network and HF_ENDPOINT, then try again; a file at hand is read with source = file",
        "source.unavailable",
    )  # fmt: skip
