"""A hub that means harm: what it says and sends writes no file but its own, ends, and learns no token of others."""

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tasks.errors import InputError, PermissionRefused, SourceChanged, UnavailableError
from tasks.hub import Patience, fetch_file
from tests.hub import REVISION, Hub

DATA = b"x" * 100_000
REPO, FILE = "someone/trees", "trees.jsonl"
ONCE = Patience(retries=0, backoff_s=0, most=10 * len(DATA))


def fetch(sha256: str | None, size: int | None = None, patience: Patience = ONCE) -> Path:
    return fetch_file(REPO, FILE, REVISION, sha256, size=size, patience=patience)


@pytest.fixture
def sha256(hub: Hub) -> str:
    return hub.add(REPO, FILE, DATA, large=False)


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file() or path.is_symlink()}


@pytest.mark.parametrize("name", ["ETag", "X-Linked-Etag"])
@pytest.mark.parametrize("weak", ["", "W/"])
def test_an_etag_that_is_a_path_overwrites_nothing(hub: Hub, sha256: str, tmp_path: Path, name: str, weak: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for path in (str(victim), "../" * 9 + str(victim)[1:]):
        hub.lies = {name: f'{weak}"{path}"', **({} if name == "ETag" else {"ETag": ""})}
        with pytest.raises(InputError, match=r"source.unpinned.*expected an etag that is a sha256 or a git hash"):
            fetch(sha256)
    assert victim.read_text() == "precious"
    assert files(tmp_path) == {victim}


def test_an_etag_is_checked_in_every_answer_and_not_only_in_the_first(hub: Hub, sha256: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    honest = hub.files[f"/{REPO}/resolve/{REVISION}/{FILE}"]

    class Turning(type(honest)):  # type: ignore[misc]
        asked = 0

        @property
        def etag(self) -> str:
            self.asked += 1
            return sha256 if self.asked == 1 else str(victim)

        @etag.setter
        def etag(self, _: str) -> None: ...

    hub.files[f"/{REPO}/resolve/{REVISION}/{FILE}"] = Turning(honest.data, "", False, REVISION)
    with pytest.raises(UnavailableError, match="does not speak the hub's protocol"):
        fetch(sha256)
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("status", [200, 404])
def test_a_commit_that_is_a_path_makes_no_file(hub: Hub, sha256: str, tmp_path: Path, status: int) -> None:
    hub.lies = {"X-Repo-Commit": "../../../planted", "X-Error-Code": "EntryNotFound"}
    if status == 404:
        hub.fail(404, times=9)
    with pytest.raises((InputError, UnavailableError)):
        fetch(sha256)
    assert not files(tmp_path)


def without_end(send: Callable[[bytes], object]) -> None:
    while True:
        send(b"x" * 65_536)


@pytest.mark.parametrize("etag", [True, False])
def test_a_body_without_end_is_cut_at_the_size_that_is_pinned_or_the_most(
    hub: Hub, sha256: str, tmp_path: Path, etag: bool
) -> None:
    hub.body, hub.lies = without_end, {"Content-Length": "", "Transfer-Encoding": ""}
    with pytest.raises(UnavailableError, match=r"source.unavailable\]: the hub sends more than 1,000,000 bytes"):
        fetch(sha256 if etag else None)
    with pytest.raises(UnavailableError, match=r"source.unavailable\]: the hub sends more than 100,000 bytes"):
        fetch(sha256, size=len(DATA))
    assert not files(tmp_path / "hub-cache") - {*(tmp_path / "hub-cache").glob("CACHEDIR.TAG"), *locks(tmp_path)}


def locks(tmp_path: Path) -> Iterator[Path]:
    return (tmp_path / "hub-cache" / ".locks").rglob("*.lock")


def test_a_body_that_is_sent_a_byte_at_a_time_is_given_up(hub: Hub, sha256: str) -> None:
    ended = threading.Event()

    def slowly(send: Callable[[bytes], object]) -> None:
        while not ended.wait(0.05):
            send(b"x")

    hub.body = slowly
    try:
        with pytest.raises(UnavailableError, match=r"source.unavailable\]: the hub sends less than 1,000 bytes a sec"):
            fetch(sha256, patience=replace(ONCE, window_s=5))
    finally:
        ended.set()


def test_a_head_that_is_sent_a_byte_at_a_time_is_given_up(hub: Hub, sha256: str) -> None:
    ended = threading.Event()

    def slowly(send: Callable[[bytes], object]) -> None:
        send(b"HTTP/1.1 200 OK\r\nX-Name: ")
        while not ended.wait(0.05):
            send(b"x")

    hub.head = slowly
    try:
        with pytest.raises(UnavailableError, match=r"source.unavailable.*tried 1 times"):
            fetch(sha256, patience=replace(ONCE, window_s=0.5))
    finally:
        ended.set()


@pytest.mark.parametrize("size", ["99999999999999999999", "2000000"])
def test_a_size_beyond_the_most_is_refused_before_a_byte_is_fetched(hub: Hub, sha256: str, size: str) -> None:
    hub.lies = {"Content-Length": size}
    with pytest.raises(UnavailableError, match=rf"source.unavailable\]: the hub says that the file has {int(size):,}"):
        fetch(sha256)
    assert not hub.bodies()


def test_a_size_that_is_not_the_pinned_one_is_a_change(hub: Hub, sha256: str) -> None:
    with pytest.raises(SourceChanged, match=r"expected 99,999 bytes, found 100,000"):
        fetch(sha256, size=99_999)
    assert not hub.bodies()


@pytest.mark.parametrize(
    "lies",
    [
        {"Content-Length": "many"},
        {"Content-Length": "9" * 25},
        {"Content-Length": "-1"},
        {"Content-Range": "bytes 0-9/*"},
        {"Content-Encoding": "gzip"},
        {"Location": "http://[", "X-Linked-Etag": "a" * 40},
    ],
)
def test_headers_that_make_no_sense_are_a_service_that_does_not_work(
    hub: Hub, sha256: str, lies: dict[str, str]
) -> None:
    hub.lies = lies
    with pytest.raises(UnavailableError, match=r"source.unavailable"):
        fetch(sha256)


@pytest.mark.parametrize("large", [True, False])
def test_the_page_of_an_error_is_not_counted_as_the_file(hub: Hub, large: bool) -> None:
    sha256 = hub.add(REPO, FILE, b"small", large=large)
    hub.page = b"<html>" * 1_000
    hub.fail(503, method="GET", times=2)
    assert fetch(sha256, patience=Patience(3, 0)).read_bytes() == b"small"
    hub.page = b"x" * (2 << 20)
    hub.fail(403, method="GET")
    with pytest.raises((UnavailableError, PermissionRefused)):
        fetch(hub.add(REPO, FILE, b"other", large=large))


def test_a_wait_that_a_header_asks_for_is_not_kept(hub: Hub, sha256: str) -> None:
    hub.lies = {"Retry-After": "100000", "ratelimit": '"api";r=0;t=100000'}
    hub.fail(429, method="GET")
    assert fetch(sha256).read_bytes() == DATA


@pytest.mark.parametrize("large", [True, False])
def test_the_token_goes_to_no_host_that_a_header_names(hub: Hub, monkeypatch: pytest.MonkeyPatch, large: bool) -> None:
    sha256 = hub.add(REPO, FILE, DATA, large=large)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with Hub() as other:
        other.files = hub.files
        hub.lies = {
            "X-Xet-Hash": "a" * 64,
            "X-Xet-Refresh-Route": f"{other.url}/api/refresh",
            "X-Xet-Cas-Url": other.url,
            "X-Xet-Access-Token": "t",
            "X-Xet-Token-Expiration": "9999999999",
            "Link": f'<{other.url}/api/refresh>; rel="xet-auth"',
        }
        assert fetch(sha256).read_bytes() == DATA
        assert not other.requests, "Xet is not spoken"
    assert {request.token for request in hub.requests if not request.path.startswith("/cdn/")} == {"hf_secret"}
    assert {request.token for request in hub.requests if request.path.startswith("/cdn/")} <= {None}


def test_the_token_does_not_follow_a_redirect(hub: Hub, sha256: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    place = f"/{REPO}/resolve/{REVISION}/{FILE}"
    with Hub() as other:
        other.files = dict(hub.files)
        for status in (301, 302, 307, 308):
            hub.requests.clear()
            hub.faults = [("HEAD", status), ("HEAD", status), ("GET", status)]
            hub.lies = {"Location": f"{other.url}{place}", "ETag": f'"{sha256}"', "X-Repo-Commit": REVISION}
            assert fetch(sha256).read_bytes() == DATA
            (Path(os.environ["HF_HUB_CACHE"]) / f"models--{REPO.replace('/', '--')}/blobs/{sha256}").unlink()
        assert other.requests
        assert {request.token for request in other.requests} == {None}
