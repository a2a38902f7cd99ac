import hashlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from tasks.download import DownloadParams
from tasks.sample.dataset import SAMPLE_NAME, sample_bytes
from tasks.sources import MODELS, SOURCES, FileName, LocalPath, RepoId, Revision, Sha256

GOOD: dict[str, Any] = {
    "source": "hub",
    "repo": "OpenAssistant/oasst2",
    "file": "2023-11-05_oasst2_ready.trees.jsonl.gz",
    "revision": "179dd21fc55192153d94adb0e0ce8f69e222bf75",
    "sha256": "0" * 64,
}
UNSAFE = [
    *("..", "../x", "a/../../x", "/etc/passwd", "a//b", "", ".", "./x", "a/.", "x.", "x ", " x", "x" * 201),
    *("C:\\x", "C:x", "\\\\host\\share\\x", "a\\b", "manifest.json", "a/manifest.json"),
    *("x\0y", "x\ny", "x\x1b[31m", "x\x7f", "x\u2028y", "x\u202ey"),
]
NOT_A_REPO = [
    *("../x", "a/b/c", "http://169.254.169.254", "-oProxyCommand", "--upload-pack=x"),
    *("a..b", "x.git", "a b", "é/x", ""),
]


def accepts(kind: Any, text: str) -> bool:
    try:
        TypeAdapter(kind).validate_python(text)
    except ValidationError:
        return False
    return True


def test_the_sample_is_pinned_like_any_source() -> None:
    made, pinned = sample_bytes(), SOURCES["sample"]
    assert (SAMPLE_NAME, hashlib.sha256(made).hexdigest(), len(made)) == (pinned.file, pinned.sha256, pinned.bytes)


def test_every_registered_source_passes_the_gate_for_names_given_by_hand() -> None:
    for source in SOURCES.values():
        assert accepts(FileName, source.file)
        assert accepts(Sha256, source.sha256)
        assert source.licence
        if source.repo:
            assert accepts(RepoId, source.repo)
            assert accepts(Revision, source.revision or "")
    for model in MODELS.values():
        assert accepts(RepoId, model.repo)
        assert accepts(Revision, model.revision)
        assert {"config.json", "model.safetensors"} == set(model.files)
        assert all(accepts(Sha256, sha256) for sha256 in model.files.values())
        assert not any(name.endswith((".bin", ".pt", ".h5")) for name in model.files), "pickles run code"


@pytest.mark.parametrize(
    "name",
    ["trees.jsonl.gz", "data/train-00000-of-00001.parquet", "Bäume (1).jsonl", "_x", "a+b=c@d.x", "a, b [c].jsonl"],
)
def test_a_plain_relative_name_is_accepted(name: str) -> None:
    assert accepts(FileName, name)


@pytest.mark.parametrize("name", UNSAFE)
def test_a_name_that_could_leave_the_folder_or_the_line_is_refused(name: str) -> None:
    assert not accepts(FileName, name)


@pytest.mark.parametrize(
    "path",
    [
        "/data/my chats, v2 [final].jsonl",
        "/a b/c,d/{e}/f & g's #1; $x!.jsonl",
        "/data/-x",
        "/data/a:b*?.jsonl",
        "/d/ x ",
        "é",
    ],
)
def test_a_local_file_may_have_any_name_that_can_be_printed(path: str) -> None:
    assert accepts(LocalPath, path)


@pytest.mark.parametrize(
    "path",
    [
        *("a/../x", "../x", "x\0y", "~/.ssh/id", "file:///etc/passwd", "s3://bucket/x", "x\ny", "", "/", "a/.."),
        *("a/x\u202ey", "a/\udcff", "a/manifest.json", "a/" + "é" * 101),
    ],
)
def test_a_path_that_says_more_than_where_a_file_lies_is_refused(path: str) -> None:
    assert not accepts(LocalPath, path)


@pytest.mark.parametrize(
    ("setting", "bad"),
    [
        *[("repo", bad) for bad in NOT_A_REPO],
        *[("revision", bad) for bad in ("main", "--help", "179dd21", "A" * 40, "0" * 41, "refs/pr/1", "")],
        *[("sha256", bad) for bad in ("0" * 63, "0" * 65, "G" * 64, "A" * 64, "")],
        *[("file", bad) for bad in UNSAFE],
    ],
)  # fmt: skip
def test_a_bad_setting_is_refused_with_what_was_expected_and_found(setting: str, bad: str) -> None:
    with pytest.raises(ValidationError, match=rf"{setting}: expected .*, found {re.escape(repr(bad))[:20]}"):
        DownloadParams(**{**GOOD, setting: bad})


@given(st.text(max_size=20))
def test_no_repository_id_is_accepted_that_the_client_would_refuse(text: str) -> None:
    if accepts(RepoId, text):
        try:
            validate_repo_id(text)
        except HFValidationError:
            pytest.fail(f"{text!r} is not a repository id to the client")


@given(st.text(max_size=30))
def test_an_accepted_file_name_stays_below_its_folder(text: str) -> None:
    if accepts(FileName, text):
        assert (Path("/out") / text).resolve().is_relative_to("/out/")
        assert text.isprintable()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "nosuch"}, "expected one of sample, oasst2, oasst2-all, oasst1, hub, file, found 'nosuch'"),
        ({"source": "hub", "repo": "a/b"}, "expected file, repo, revision, sha256, found no file, revision, sha256"),
        ({"source": "file"}, "source file: expected path, found no path"),
        ({"source": "oasst2", "sha256": "0" * 64}, "source oasst2: expected no sha256, found sha256"),
        ({"source": "file", "path": "x", "repo": "a/b"}, "source file: expected no repo, found repo"),
        ({"source": "sample", "max_rows": 1}, "Extra inputs are not permitted"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_the_source_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        DownloadParams(**settings)


def test_every_setting_tells_the_form_what_it_is() -> None:
    schema = DownloadParams.model_json_schema()
    assert all(setting.get("description") for setting in schema["properties"].values())
    assert schema["properties"]["source"]["enum"] == [*SOURCES, "hub", "file"]


def test_keys_are_made_without_the_hubs_client_and_its_libraries() -> None:
    code = """
import sys
from tasks.download import DownloadParams
DownloadParams(source="oasst2").keyed()
heavy = {"huggingface_hub", "httpx2", "polars", "pyarrow", "numpy", "prefect", "torch", "tasks.sample.dataset"}
print(sorted(heavy & set(sys.modules)))
"""
    root = Path(__file__).resolve().parents[1]
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
