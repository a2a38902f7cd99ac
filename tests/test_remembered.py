"""Laws of declarations: the guard watches the module that computes, and packages that decide rows are settings."""

import importlib.metadata
import unicodedata
from functools import partial

import pytest

from tasks.dialogue import pii
from tasks.remembered import UNICODE, Remembered

DECLARED = Remembered("personal", 3, "tasks.dialogue.pii", ("polars", UNICODE))


def test_versions_of_packages_are_among_the_settings() -> None:
    made = DECLARED.of(pii.scan, {"n": 1})
    packages = {"polars": importlib.metadata.version("polars"), "unicode": unicodedata.unidata_version}
    assert made.settings == {"n": 1, "packages": packages}
    assert (made.name, made.version) == ("personal", 3)
    assert DECLARED.named({"n": 1}).settings == made.settings


def test_what_computes_must_stand_where_the_guard_looks() -> None:
    with pytest.raises(ValueError, match=r"declared of tasks.dialogue.language, and computed by tasks.dialogue.pii"):
        Remembered("personal", 1, "tasks.dialogue.language").of(partial(pii.scan), {})
