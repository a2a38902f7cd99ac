import gzip
import hashlib
import io
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from pydantic import ValidationError

from tasks.download import DownloadParams, DownloadRuntime, download
from tasks.errors import (
    ConfigurationError,
    InputError,
    ParameterError,
    PermissionRefused,
    SourceChanged,
    TreelineError,
    UnavailableError,
)
from tasks.hub import Patience, fetch_file
from tasks.progress import listening
from tasks.sources import SOURCES
from tests.hub import REVISION, Hub

DATA = b"".join(b'{"message_tree_id": "%d"}\n' % n for n in range(40_000))  # about 1 MB
REPO, FILE = "someone/trees", "data/ready.trees.jsonl"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    made = tmp_path / "out"
    made.mkdir()
    return made


@pytest.fixture
def published(hub: Hub) -> DownloadParams:
    return pin(hub.add(REPO, FILE, DATA, repo_type="dataset"))


def pin(sha256: str, **changes: str) -> DownloadParams:
    return DownloadParams.model_validate(
        {"source": "hub", "repo": REPO, "file": FILE, "revision": REVISION, "sha256": sha256, **changes}
    )


def fetch(out: Path, params: DownloadParams, retries: int = 3, backoff_s: float = 0.001) -> bytes:
    with patch("tasks.download.Patience", partial(Patience, retries=retries, backoff_s=backoff_s)):
        counts = download.function(out, params, DownloadRuntime())
    (path,) = out.iterdir()
    assert counts == {"files": 1, "bytes": path.stat().st_size}
    assert path.is_file()
    assert not path.is_symlink()
    return path.read_bytes()


def blob(tmp_path: Path) -> Path:
    (found,) = (tmp_path / "hub-cache").glob("datasets--*/blobs/*")
    return found


class Bars:
    """A listener that remembers how far each bar went."""

    def __init__(self) -> None:
        self.seen: dict[str, list[float]] = {}

    @contextmanager
    def bar(self, label: str, total: float | None, unit: str) -> Iterator[Any]:
        assert unit == "bytes"
        steps = self.seen[label] = [total or 0]

        class Bar:
            def advance(self, amount: float = 1, note: str = "") -> None:
                steps.append(amount)

        yield Bar()


# The hub, when all is well


def test_a_file_of_the_hub_arrives_under_its_own_name(hub: Hub, published: DownloadParams, out: Path) -> None:
    assert fetch(out, published) == DATA
    assert [path.name for path in out.iterdir()] == ["ready.trees.jsonl"]


def test_a_small_file_that_is_not_in_lfs_arrives_too(hub: Hub, out: Path) -> None:
    sha256 = hub.add(REPO, FILE, DATA, repo_type="dataset", large=False)
    assert fetch(out, pin(sha256)) == DATA


def test_a_second_download_asks_the_hub_for_nothing(hub: Hub, published: DownloadParams, out: Path) -> None:
    fetch(out, published)
    before = len(hub.requests)
    assert fetch(out, published) == DATA
    assert len(hub.requests) == before


def test_progress_is_told_in_bytes_and_reaches_the_size(hub: Hub, published: DownloadParams, out: Path) -> None:
    bars = Bars()
    with listening(bars):
        fetch(out, published)
    assert set(bars.seen) == {"download", "verify", "copy"}
    for total, *steps in bars.seen.values():
        assert total == sum(steps) == len(DATA)


def test_the_token_goes_to_the_hub_and_not_to_the_host_that_stores_large_files(
    hub: Hub, published: DownloadParams, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "hf_right"
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert fetch(out, published) == DATA
    assert {request.token for request in hub.requests if request.path.startswith("/datasets/")} == {"hf_right"}
    assert {request.token for request in hub.requests if request.path.startswith("/cdn/")} == {None}


# The hub, when it fails


def test_a_cut_transfer_goes_on_where_it_ended(
    hub: Hub, published: DownloadParams, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100_000)  # what it writes at once: 10 MB
    hub.cuts = [300_001]
    assert fetch(out, published) == DATA
    assert [request.range for request in hub.bodies()] == [None, "bytes=300000-"]


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_hub_that_is_down_for_a_moment_is_asked_again(
    hub: Hub, published: DownloadParams, out: Path, status: int
) -> None:
    hub.fail(status, times=2)
    assert fetch(out, published) == DATA


def test_pauses_double_up_to_half_a_minute(
    hub: Hub, published: DownloadParams, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("tasks.hub.time.sleep", pauses.append)
    hub.fail(503, times=1_000)
    with pytest.raises(UnavailableError):
        fetch(out, published, retries=6, backoff_s=1)
    assert pauses == [1, 2, 4, 8, 16, 30]


def test_a_store_of_large_files_that_is_down_for_a_moment_is_asked_again(
    hub: Hub, published: DownloadParams, out: Path
) -> None:
    hub.fail(502, times=2, method="GET")
    assert fetch(out, published) == DATA


def test_a_hub_that_stays_down_is_given_up_after_the_retries(hub: Hub, published: DownloadParams, out: Path) -> None:
    hub.fail(503, times=1_000)
    with pytest.raises(
        UnavailableError, match=r"source.unavailable.*answered 503, tried 4 times.*nothing in the cache"
    ):
        fetch(out, published)
    assert len(hub.requests) == 4


def test_a_hub_that_cannot_be_reached_is_unavailable(
    hub: Hub, published: DownloadParams, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(UnavailableError, match=r"ConnectError \(.*refused\), tried 1 times"):
            fetch(out, published, retries=0)


def test_offline_a_good_copy_in_the_cache_is_used_and_without_one_the_step_fails_at_once(
    hub: Hub, published: DownloadParams, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch(out, published)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fetch(out, published) == DATA
    with pytest.raises(UnavailableError, match=r"HF_HUB_OFFLINE.*nothing in the cache"):
        fetch(out, pin(published.sha256 or "", file="other.jsonl"))


@pytest.mark.parametrize(
    ("change", "missing"),
    [({"repo": "someone/else"}, "repository"), ({"revision": "b" * 40}, "revision"), ({"file": "other"}, "file")],
)
def test_what_the_hub_does_not_have_is_named(
    hub: Hub, published: DownloadParams, out: Path, change: dict[str, str], missing: str
) -> None:
    with pytest.raises(InputError, match=rf"source.missing\]: the hub has no such {missing} \(status 404\)"):
        fetch(out, pin(published.sha256 or "", **change))
    assert len(hub.requests) == 1, "another try would not help"


def test_a_refused_reader_is_told_of_the_token(hub: Hub, published: DownloadParams, out: Path) -> None:
    hub.token = "hf_right"
    with pytest.raises(PermissionRefused, match=r"source.denied.*401.*HF_TOKEN is not set"):
        fetch(out, published)
    hub.token, hub.gated = None, True
    with pytest.raises(PermissionRefused, match=r"source.denied.*403"):
        fetch(out, published)


@pytest.mark.parametrize("token", ["hf_secret", "hf_secret\twith a tab", "hf_secret\nX-Header: y", "hf_sécret"])
@pytest.mark.parametrize("status", [401, 403, 404, 400, 503])
def test_no_error_quotes_the_token(
    hub: Hub, published: DownloadParams, out: Path, monkeypatch: pytest.MonkeyPatch, token: str, status: int
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    hub.fail(status, times=9)
    with pytest.raises(TreelineError) as caught:
        fetch(out, published, retries=0)
    assert not any(part in str(caught.value) for part in ("secret", "sécret"))
    assert caught.value.__suppress_context__
    assert caught.value.__cause__ is None


def test_what_the_store_keeps_holds_no_token(
    hub: Hub, published: DownloadParams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TREELINE_ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    raw = download(published, DownloadRuntime())
    assert [path.read_bytes() for path in raw.data()] == [DATA]
    assert any(request.token == "hf_secret" for request in hub.requests)
    kept = [path for path in (tmp_path / "artifacts").rglob("*") if path.is_file()]
    assert raw.path / "manifest.json" in kept
    assert not any(b"hf_secret" in path.read_bytes() for path in kept)


def test_an_endpoint_that_is_no_address_is_a_matter_of_configuration(
    hub: Hub, published: DownloadParams, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "gopher://hub")
    with pytest.raises(ConfigurationError, match="HF_ENDPOINT"):
        fetch(out, published, retries=0)


# The hub, when its bytes are not the pinned ones


def test_a_wrong_pin_is_found_out_before_a_byte_of_a_large_file_is_transferred(
    hub: Hub, published: DownloadParams, out: Path
) -> None:
    with pytest.raises(SourceChanged) as caught:
        fetch(out, pin("0" * 64))
    assert f"expected sha256 {'0' * 64}, found {published.sha256} ({len(DATA):,} bytes)" in str(caught.value)
    assert hub.bodies() == []


def test_a_small_file_that_changed_under_its_revision_names_expected_and_found(hub: Hub, out: Path) -> None:
    sha256 = hub.add(REPO, FILE, DATA, repo_type="dataset", large=False)
    moved = hub.add(REPO, FILE, b"moved", repo_type="dataset", large=False)
    with pytest.raises(SourceChanged, match=f"expected sha256 {sha256}, found {moved} \\(5 bytes\\)"):
        fetch(out, pin(sha256))


def test_bytes_that_contradict_the_hubs_own_etag_are_fetched_twice_and_then_refused(hub: Hub, out: Path) -> None:
    sha256 = hashlib.sha256(DATA).hexdigest()
    found = hub.add(REPO, FILE, DATA[:-1] + b"!", repo_type="dataset", etag=sha256)
    with pytest.raises(SourceChanged, match=f"expected sha256 {sha256}, found {found}"):
        fetch(out, pin(sha256))
    assert len(hub.bodies()) == 2


def test_an_answer_for_another_commit_is_refused(hub: Hub, out: Path) -> None:
    sha256 = hub.add(REPO, FILE, DATA, repo_type="dataset", commit="c" * 40)
    with pytest.raises(SourceChanged, match=f"expected revision {REVISION}, found {'c' * 40}"):
        fetch(out, pin(sha256))


@pytest.mark.parametrize("harm", [lambda data: data[:10], lambda data: b"X" + data[1:], lambda data: b""])
def test_a_damaged_copy_in_the_cache_is_fetched_anew(
    hub: Hub, published: DownloadParams, out: Path, tmp_path: Path, harm: Any
) -> None:
    fetch(out, published)
    blob(tmp_path).write_bytes(harm(DATA))
    assert fetch(out, published) == DATA
    assert blob(tmp_path).read_bytes() == DATA, "the next reader of the cache is not served the bad copy either"
    assert len(hub.bodies()) == 2


def test_a_damaged_copy_in_the_cache_is_never_used_offline(
    hub: Hub, published: DownloadParams, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch(out, published)
    blob(tmp_path).write_bytes(DATA[:10])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UnavailableError, match=r"the copy in the cache, .*, is not the pinned one"):
        fetch(out, published)


# Without a pinned sha256: model files


@pytest.mark.parametrize("large", [True, False])
def test_without_a_pinned_hash_the_hubs_etag_is_the_witness(hub: Hub, large: bool) -> None:
    hub.add("someone/model", "model.safetensors", DATA, large=large)
    path = fetch_file("someone/model", "model.safetensors", REVISION)
    assert path.read_bytes() == DATA
    path.resolve().write_bytes(DATA[:10])
    assert fetch_file("someone/model", "model.safetensors", REVISION).read_bytes() == DATA
    before = len(hub.requests)
    assert fetch_file("someone/model", "model.safetensors", REVISION).read_bytes() == DATA
    assert len(hub.requests) == before, "the cache keeps the etag, so a good copy needs no hub"


def test_without_a_pinned_hash_an_etag_that_is_no_hash_is_refused(hub: Hub) -> None:
    hub.add("someone/model", "config.json", b"{}", large=False, etag="17-5f2")
    with pytest.raises(InputError, match=r"source.unpinned.*expected an etag that is a sha256 or a git hash"):
        fetch_file("someone/model", "config.json", REVISION, patience=Patience(0, 0))


# Local files


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made, other = tmp_path / "allowed", tmp_path / "other"
    made.mkdir()
    other.mkdir()
    monkeypatch.setenv("TREELINE_SOURCE_ROOTS", os.pathsep.join((str(other), str(made))))
    return made


def local(path: Path, **more: str) -> DownloadParams:
    return DownloadParams.model_validate({"source": "file", "path": str(path), **more})


def test_a_file_under_an_allowed_folder_is_copied(root: Path, out: Path) -> None:
    (root / "trees.jsonl").write_bytes(DATA)
    assert fetch(out, local(root / "trees.jsonl")) == DATA


@pytest.mark.parametrize("name", ["my chats, v2.jsonl", "a [b] {c} 'd' & *?.jsonl", ".hidden", "a:b\\c"])
def test_a_local_file_keeps_its_name_whatever_stands_in_it(root: Path, out: Path, name: str) -> None:
    (root / "one, two").mkdir()
    (root / "one, two" / name).write_bytes(DATA)
    assert fetch(out, local(root / "one, two" / name)) == DATA
    assert [path.name for path in out.iterdir()] == [name]


def test_a_local_file_can_be_pinned(root: Path, out: Path) -> None:
    (root / "trees.jsonl").write_bytes(DATA)
    with pytest.raises(SourceChanged, match=f"expected sha256 {'0' * 64}, found {hashlib.sha256(DATA).hexdigest()}"):
        fetch(out, local(root / "trees.jsonl", sha256="0" * 64))


def test_a_link_that_stays_inside_is_followed_and_one_that_leads_out_is_refused(
    root: Path, out: Path, tmp_path: Path
) -> None:
    (root / "trees.jsonl").write_bytes(DATA)
    (root / "latest.jsonl").symlink_to("trees.jsonl")
    assert fetch(out, local(root / "latest.jsonl")) == DATA
    (tmp_path / "secret").write_text("secret")
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "folder").symlink_to(tmp_path)
    for path in (root / "link", root / "folder" / "secret"):
        with pytest.raises(ParameterError, match=r"param.path\]: expected a file under an allowed folder"):
            local(path).keyed()


def test_a_loop_of_links_is_refused(root: Path) -> None:
    (root / "a").symlink_to("b")
    (root / "b").symlink_to("a")
    with pytest.raises(ParameterError, match=r"param\.path"):
        local(root / "a").keyed()


def test_what_is_not_a_file_is_refused(root: Path) -> None:
    (root / "folder").mkdir()
    os.mkfifo(root / "pipe")
    for name, found in {"nothing": "nothing", "folder": "a folder or device", "pipe": "a folder or device"}.items():
        with pytest.raises(ParameterError, match=rf"param.path\]: expected a file, found {found}"):
            local(root / name).keyed()


def test_outside_of_the_allowed_folders_not_even_existence_is_told(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").touch()
    (tmp_path / "allowed-too").touch()  # the name of an allowed folder is its prefix
    for name in ("there", "absent", "allowed-too"):
        with pytest.raises(ParameterError, match=r"param.path\]: expected a file under an allowed folder"):
            local(tmp_path / name).keyed()
    monkeypatch.delenv("TREELINE_SOURCE_ROOTS")
    with pytest.raises(ParameterError, match="TREELINE_SOURCE_ROOTS is not set"):
        local(root / "trees.jsonl").keyed()


def test_moving_a_local_file_keeps_its_key_and_editing_or_renaming_it_changes_it(root: Path) -> None:
    here, there = root / "trees.jsonl", root / "deeper" / "trees.jsonl"
    there.parent.mkdir()
    here.write_bytes(DATA)
    params = local(here)
    before = params.keyed()
    assert str(root) not in str(before)
    here.rename(there)
    assert local(there).keyed() == before
    here.write_bytes(DATA + b"\n")
    assert params.keyed() != before
    there.rename(root / "other.jsonl")
    assert local(root / "other.jsonl").keyed() != before


def test_a_local_file_that_changes_after_its_key_was_made_is_refused(root: Path, out: Path) -> None:
    (root / "trees.jsonl").write_bytes(DATA)
    params = local(root / "trees.jsonl")
    params.keyed()
    (root / "trees.jsonl").write_bytes(DATA + b"\n")
    with pytest.raises(SourceChanged, match="expected sha256"):
        fetch(out, params)


# Several files


def test_several_files_arrive_in_their_order_whatever_their_names(root: Path, out: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c/b.jsonl"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(name.encode())
    also = [{"source": "file", "path": str(root / name)} for name in ("a.jsonl", "c/b.jsonl")]
    params = DownloadParams.model_validate({"source": "file", "path": str(root / "b.jsonl"), "also": also})
    counts = download.function(out, params, DownloadRuntime())
    assert {path.name: path.read_text() for path in out.iterdir()} == {
        "01-b.jsonl": "b.jsonl", "02-a.jsonl": "a.jsonl", "03-b.jsonl": "c/b.jsonl",
    }  # fmt: skip
    assert counts == {"files": 3, "bytes": 23}


def test_a_file_more_changes_the_key_and_so_does_the_order(root: Path) -> None:
    for name in "ab":
        (root / name).write_bytes(name.encode())
    one, two = ({"source": "file", "path": str(root / name)} for name in "ab")
    found = [
        DownloadParams.model_validate(given).keyed() for given in (one, {**one, "also": [two]}, {**two, "also": [one]})
    ]
    assert len({str(keyed) for keyed in found}) == 3
    assert set(found[0]) == {"repo", "revision", "file", "sha256"}  # as it was before several could be given
    assert str(root) not in str(found)


def test_a_file_more_is_checked_like_the_first(root: Path) -> None:
    with pytest.raises(ValidationError, match="source file: expected path, found no path"):
        DownloadParams.model_validate({"also": [{"source": "file"}]})
    with pytest.raises(ParameterError, match=r"param\.path"):
        DownloadParams.model_validate({"also": [{"source": "file", "path": "/etc/passwd"}]}).keyed()


# The sample, and keys


def test_the_sample_is_made_without_a_network(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object) -> None:
        raise AssertionError("the sample asked for the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    made = fetch(out, DownloadParams())
    assert gzip.GzipFile(fileobj=io.BytesIO(made)).readline().startswith(b"{")
    assert len(made) == SOURCES["sample"].bytes


def test_a_registered_source_enters_the_key_by_what_it_is_and_not_by_its_name() -> None:
    oasst2 = SOURCES["oasst2"]
    named = DownloadParams(source="oasst2").keyed()
    assert named == {
        "repo": "OpenAssistant/oasst2",
        "revision": "179dd21fc55192153d94adb0e0ce8f69e222bf75",
        "file": "2023-11-05_oasst2_ready.trees.jsonl.gz",
        "sha256": oasst2.sha256,
    }
    assert pin(oasst2.sha256, repo=oasst2.repo or "", revision=oasst2.revision or "", file=oasst2.file).keyed() == named
    assert DownloadParams().keyed() == {
        "repo": None, "revision": None, "file": "sample.trees.jsonl.gz", "sha256": SOURCES["sample"].sha256,
    }  # fmt: skip
