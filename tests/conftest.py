"""Fixtures that tests of several steps share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.hub import Hub
from tests.waiting import guarded

settings.register_profile("treeline", deadline=None)  # a busy machine is no failure
settings.load_profile("treeline")

# Before torch is loaded: tests run side by side, and OpenMP's threads would wait for each other by spinning.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def _nothing_outlives_the_tests() -> Iterator[None]:
    with guarded():
        yield


@pytest.fixture
def shared() -> Path:
    """Give the folder of real data beside the project, or skip."""
    found = Path(__file__).resolve().parents[2] / "shared"
    if not found.is_dir():
        pytest.skip("needs the real data in ../shared")
    return found


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Start a hub on the loopback, with an empty cache, and point the client there; see `tests/hub.py`."""
    from huggingface_hub import close_session, constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()  # the client's connections read the proxy variables when they are made
    with Hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server
    close_session()
