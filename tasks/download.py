"""Step 1, download: bring the published file, or several, here, byte for byte as pinned."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from pydantic import Field, PrivateAttr, model_validator

from tasks.artifacts import Counts, RawTrees
from tasks.errors import SourceChanged
from tasks.hub import Patience, fetch_file, read_pieces
from tasks.sources import SOURCES, FileName, LocalPath, RepoId, Revision, Sha256, Source, allowed_file
from tasks.step import Params, Runtime, step
from tasks.store.canonical import sha256_file

# The settings that a source given by hand needs, and those that it may have; a registered source takes none.
_NEEDS = {"hub": {"repo", "file", "revision", "sha256"}, "file": {"path"}}
_MAY = {"hub": set[str](), "file": {"sha256"}}


class Input(Params):
    """One file. What enters the key is where it lies on the hub and its content's hash, never a local path."""

    source: str = Field(default="sample", json_schema_extra={"enum": [*SOURCES, *_NEEDS]})
    """A registered dataset (`sample` is made here, offline); `hub`: any file of the hub; `file`: a local file."""

    repo: RepoId | None = None
    """For `hub`: the dataset repository, such as OpenAssistant/oasst2."""

    file: FileName | None = None
    """For `hub`: the file's path inside the repository."""

    revision: Revision | None = None
    """For `hub`: the commit, 40 hex digits. A branch is refused, because it moves."""

    sha256: Sha256 | None = None
    """For `hub`: the sha256 of the content, 64 hex digits. For `file`: the same, if it is to be checked."""

    path: LocalPath | None = None
    """For `file`: a file under one of the folders named in the environment variable TREELINE_SOURCE_ROOTS."""

    _keyed: Source | None = PrivateAttr(default=None)  # so that a local file that changes after keying is found out

    @model_validator(mode="after")
    def _fits_the_source(self) -> Self:
        if self.source not in (*SOURCES, *_NEEDS):
            raise ValueError(f"source: expected one of {', '.join((*SOURCES, *_NEEDS))}, found {self.source!r}")
        given = {name for name in ("repo", "file", "revision", "sha256", "path") if getattr(self, name) is not None}
        needed = _NEEDS.get(self.source, set())
        if needed - given:
            raise ValueError(f"source {self.source}: expected {_list(needed)}, found no {_list(needed - given)}")
        if surplus := given - needed - _MAY.get(self.source, set()):
            raise ValueError(f"source {self.source}: expected no {_list(surplus)}, found {_list(surplus)}")
        return self

    @property
    def pinned(self) -> Source:
        """The one file that these settings stand for; a local one as it was when the key was made.

        Raises:
            ParameterError: For `file`: if it is not one that may be read.
        """
        return self._keyed or self._find()

    def keyed(self) -> dict[str, Any]:
        """Return where the file lies on the hub, its name and its content's hash: a moved local file keeps its key."""
        self._keyed = pinned = self._find()
        return {"repo": pinned.repo, "revision": pinned.revision, "file": pinned.file, "sha256": pinned.sha256}

    def _find(self) -> Source:
        if self.path is not None:
            return Source(Path(self.path).name, self.sha256 or sha256_file(allowed_file(self.path)))
        if self.file is not None and self.sha256 is not None:
            return Source(self.file, self.sha256, repo=self.repo, revision=self.revision)
        return SOURCES[self.source]


class DownloadParams(Input):
    """Which dataset: a file, and others that go with it."""

    also: tuple[Input, ...] = Field(default=(), max_length=98)
    """More files, each with the same settings as the first: newer revisions, other datasets. Where two of them have a
    message with the same id, the later one wins."""

    @property
    def inputs(self) -> tuple[Input, ...]:
        """All files, in their order."""
        return (self, *self.also)

    def keyed(self) -> dict[str, Any]:
        """Return what each file is; of a single one, no more than that."""
        own = super().keyed()
        return {**own, "also": [one.keyed() for one in self.also]} if self.also else own


class DownloadRuntime(Runtime):
    """How much is taken from a hub."""

    max_download_gb: float = Field(default=16, gt=0, le=1e6)
    """Largest file that is taken from the hub, in GB, where its size is not pinned."""


@step("download", version=1, makes=RawTrees)
def download(out: Path, params: DownloadParams, run: DownloadRuntime) -> Counts:
    """Write the file as published, under its own name; of several, each with its number before it: 01-, 02-.

    Raises:
        SourceChanged: If its bytes are not the pinned ones.
        TreelineError: For the hub, as `tasks.hub.fetch_file` says; for `file`, as `tasks.sources.allowed_file` says.
    """
    size = 0
    for number, one in enumerate(params.inputs, 1):
        name = Path(one.pinned.file).name
        size += _fetch(one, out / (f"{number:02}-{name}" if params.also else name), run)
    return {"files": len(params.inputs), "bytes": size}


def _fetch(one: Input, target: Path, run: DownloadRuntime) -> int:
    """Write one file, and return its size."""
    pinned = one.pinned
    digest, size = hashlib.sha256(), 0
    with target.open("wb") as file:
        for piece in _pieces(one, pinned, run):
            file.write(piece)
            digest.update(piece)
            size += len(piece)
    if digest.hexdigest() != pinned.sha256:
        raise SourceChanged(
            f"expected sha256 {pinned.sha256}, found {digest.hexdigest()} ({size:,} bytes)",
            f"{one.path or pinned.file} of source {one.source}",
            "Run again; if the new content is meant, pin its sha256",
        )
    return size


def _pieces(params: Input, pinned: Source, run: DownloadRuntime) -> Iterator[bytes]:
    """Yield the file's content, from wherever it comes."""
    if params.path is not None:
        yield from read_pieces(allowed_file(params.path), "copy")
    elif pinned.repo and pinned.revision:
        patience = Patience(most=int(run.max_download_gb * 1e9))
        where = (pinned.repo, pinned.file, pinned.revision, pinned.sha256)
        path = fetch_file(*where, repo_type="dataset", size=pinned.bytes, patience=patience)
        yield from read_pieces(path, "copy")
    else:
        from tasks.sample.dataset import sample_bytes

        yield sample_bytes()


def _list(names: set[str]) -> str:
    return ", ".join(sorted(names))
