"""Where datasets and model weights come from: names, each pinned to the byte, and the gate for names given by hand.

A new dataset is one entry of `SOURCES`; a new model to start from is one entry of `MODELS`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from tasks.errors import ParameterError, PermissionRefused

ROOTS = "TREELINE_SOURCE_ROOTS"  # folders that local files may be taken from, separated like PATH


@dataclass(frozen=True)
class Source:
    """One published file of a dataset.

    Attributes:
        file: Its path inside the repository; the last part names the file in the artifact.
        sha256: Of its content, 64 hex digits.
        bytes: Its size; None where it is not known beforehand.
        licence: SPDX name; empty where it is not known.
        repo: Dataset repository on the hub; None for a file that is not fetched from there.
        revision: Commit of that repository, 40 hex digits.
    """

    file: str
    sha256: str
    bytes: int | None = None
    licence: str = ""
    repo: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class HubModel:
    """A published model: the commit of its repository, and the sha256 of each file that training starts from."""

    repo: str
    revision: str
    licence: str
    files: Mapping[str, str]


_OASST2 = ("OpenAssistant/oasst2", "179dd21fc55192153d94adb0e0ce8f69e222bf75")
_OASST1 = ("OpenAssistant/oasst1", "fdf72ae0827c1cda404aff25b6603abec9e3399b")

# Embedded sources (no repository) are made by `tasks.sample.dataset`, the same bytes on every machine.
SOURCES: Mapping[str, Source] = {
    "sample": Source(
        "sample.trees.jsonl.gz",
        "b48bddc624688748b5d483426cd418520f89006dd9efb149ea289432e755be68",
        9_225_355,
        "Apache-2.0",
    ),
    "oasst2": Source(
        "2023-11-05_oasst2_ready.trees.jsonl.gz",
        "7a886a16ccfc1173c4f00a6897523e3c95b2785a86ee44a18a98f4f2807ee29b",
        54_370_156,
        "Apache-2.0",
        *_OASST2,
    ),
    "oasst2-all": Source(
        "2023-11-05_oasst2_all.trees.jsonl.gz",
        "2cf3d24faf92ca95d1ca442804f3c95e73c53afbe6aa06aba5a3bf86995f42f0",
        75_314_383,
        "Apache-2.0",
        *_OASST2,
    ),
    "oasst1": Source(
        "2023-04-12_oasst_ready.trees.jsonl.gz",
        "2a9a8fd343e9b28e04a895a669d3253f82d93e9c174d440199ae19d5fafbdff7",
        34_145_252,
        "Apache-2.0",
        *_OASST1,
    ),
}

# Hashes as public projects recorded them for these commits; a wrong one would be refused, never believed.
MODELS: Mapping[str, HubModel] = {
    "gpt2": HubModel("openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e", "MIT", {
        "config.json": "0daed7749b4f02b8f76240d5444551d7b08712dab4d0adb8239c56ba823bb7b4",
        "model.safetensors": "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    }),
    "gpt2-medium": HubModel("openai-community/gpt2-medium", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da", "MIT", {
        "config.json": "ef1a44d889ad1a0acc7731c78134f1b87d2d222f110e97dd10fd4117331caf22",
        "model.safetensors": "fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd",
    }),
    "gpt2-large": HubModel("openai-community/gpt2-large", "32b71b12589c2f8d625668d2335a01cac3249519", "MIT", {
        "config.json": "7fccdcfd6622055342a734c663ee0b61ff4fd697f42467595df0bf4448c8c170",
        "model.safetensors": "5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce",
    }),
    "gpt2-xl": HubModel("openai-community/gpt2-xl", "15ea56dee5df4983c59b2538573817e1667135e2", "MIT", {
        "config.json": "be48115d52314bc27327e160bf10197760db02ea689d10adb24db4102edf7a8a",
        "model.safetensors": "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
    }),
}  # fmt: skip

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_REPO = re.compile(r"(?:[A-Za-z0-9_][\w.-]{0,95}/)?[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
# One part of a path in a repository; no colon, no backslash, no control.
_PART = re.compile(r"[\w+=@()\[\]-][\w .,;+=@()\[\]{}'!&#~-]{0,199}")
LONGEST = 200  # bytes of a name; most file systems take 255, and a number may be put before it


def _refuse(name: str, expected: str, found: str) -> None:
    raise ValueError(f"{name}: expected {expected}, found {found[:200]!r}")


def _repo(text: str) -> str:
    if not _REPO.fullmatch(text) or "--" in text or ".." in text or text.endswith((".git", ".", "-")):
        _refuse("repo", "a repository id like OpenAssistant/oasst2", text)
    return text


def _hex(name: str, digits: int) -> Callable[[str], str]:
    def check(text: str) -> str:
        if not re.fullmatch(f"[0-9a-f]{{{digits}}}", text):
            _refuse(name, f"{digits} hex digits in lower case", text)
        return text

    return check


def _file_name(text: str) -> str:
    parts = text.split("/")
    if any(not _PART.fullmatch(part) or part.endswith((".", " ")) for part in parts):
        _refuse("file", "a relative path of plain names, without '..'", text)
    if parts[-1] == "manifest.json":  # the artifact's own manifest lies beside the file
        _refuse("file", "any name but manifest.json", text)
    return text


def _local_path(text: str) -> str:
    if _CONTROL.search(text) or "://" in text or text.startswith("~") or ".." in text.split("/"):
        _refuse("path", "a path without '..', '~', '://' or control characters", text)
    name = Path(text).name
    if not name or not name.isprintable() or name == "manifest.json" or len(name.encode()) > LONGEST:
        _refuse("path", f"a name of printable characters, of at most {LONGEST} bytes, that is not manifest.json", text)
    return text


RepoId = Annotated[str, AfterValidator(_repo)]
Revision = Annotated[str, AfterValidator(_hex("revision", 40))]
Sha256 = Annotated[str, AfterValidator(_hex("sha256", 64))]
FileName = Annotated[str, AfterValidator(_file_name)]
LocalPath = Annotated[str, AfterValidator(_local_path)]


def allowed_file(path: str) -> Path:
    """Return a local path with all links resolved, if it is a file under one of `$TREELINE_SOURCE_ROOTS`.

    Raises:
        ParameterError: `param.path`, if it lies outside of them, or is no regular file.
        PermissionRefused: If it may not be read.
    """
    roots = [Path(root).resolve() for root in os.environ.get(ROOTS, "").split(os.pathsep) if root]
    try:
        found = Path(path).resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise _outside(path, str(error), roots) from error
    if not any(found.is_relative_to(root) for root in roots):
        raise _outside(path, str(found), roots)
    if not found.is_file():
        what = "a folder or device" if found.exists() else "nothing"
        raise ParameterError(f"expected a file, found {what}", f"{found}", "Give the path of a file", "param.path")
    if not os.access(found, os.R_OK):
        raise PermissionRefused("the source file may not be read", f"{found}", "Let this user read it")
    return found


def _outside(path: str, found: str, roots: list[Path]) -> ParameterError:
    allowed = os.pathsep.join(map(str, roots)) or f"none, ${ROOTS} is not set"
    return ParameterError(
        f"expected a file under an allowed folder ({allowed}), found {found}",
        f"path {path}",
        f"Move the file there, or name its folder in ${ROOTS}",
        "param.path",
    )
