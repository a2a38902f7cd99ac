"""Laws of `verify-resume`: it tells a resume that is exact from one that is not, and leaves the store alone."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from flows.resuming import Trial, trials
from tasks.store.canonical import sha256_of
from tasks.store.manifest import write_manifest
from tasks.train import TrainParams, TrainRuntime
from tests.test_train import MORE, tokens_in


@pytest.mark.slow
def test_killed_and_resumed_runs_are_the_same_and_the_tokens_stay(tmp_path: Path) -> None:
    tokens = tokens_in(tmp_path / "t")
    (tokens.path / "index.parquet").touch()
    write_manifest(tokens.path, replace(tokens.manifest, key=sha256_of({})))
    before = {path.name: path.read_bytes() for path in tokens.path.iterdir()}
    (tmp_path / "scratch").mkdir()
    found = trials(tokens, TrainParams(**MORE), TrainRuntime(device="cpu", threads=1), 1, tmp_path / "scratch")
    assert found == [Trial(None, None, True, True), Trial(2, 2, True, True)]
    assert {path.name: path.read_bytes() for path in tokens.path.iterdir()} == before
    log = (tmp_path / "scratch" / "whole" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [0, 1, 2, 3, 4]


def test_one_difference_is_enough() -> None:
    assert Trial(2, 2, True, True).same
    assert not Trial(2, 2, False, True).same
    assert not Trial(2, 2, True, False).same
