"""The manifest: the last file written into an artifact's folder, and the proof that the folder is whole."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, NonNegativeInt, TypeAdapter

from tasks.errors import StoreError
from tasks.jsonfile import MOST, read_json
from tasks.store.canonical import sha256_of

NAME = "manifest.json"
SCHEMA = 1  # of the manifest itself; a reader refuses a newer one and treats an unknown one as absent


class UnreadableManifest(ValueError):
    """A manifest that is missing, cut, altered or of another schema."""


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact: its size in bytes and the sha256 of its content."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    bytes: NonNegativeInt
    sha256: str


@dataclass(frozen=True)
class Notice:
    """What a step lost, or took otherwise than it stood.

    Attributes:
        code: A dotted name for machines, the step's first: `curate.leak`.
        number: How many were lost or taken otherwise.
        cause: How many of what, and why, in one sentence.
        setting: The setting that decides, or what else to do, in one sentence.
    """

    code: str
    number: int
    cause: str
    setting: str

    @property
    def step(self) -> str:
        """The step that it is of."""
        return self.code.partition(".")[0]

    def __str__(self) -> str:
        return f"warning[{self.code}]: {self.cause}. {self.setting}."


@dataclass(frozen=True)
class Manifest:
    """What an artifact holds, what made it and how.

    Attributes:
        key: sha256 of the canonical JSON of `recipe`.
        kind: The artifact's kind, such as `messages`.
        recipe: The key's preimage: step, version, params, inputs (name -> content digest).
        files: Each file of the folder but this one.
        digest: Content digest: sha256 over the names and hashes of the files that are content.
        counts: What the step measured.
        origin: Host, code revision, package versions, seconds, runtime: recorded, never keyed.
        created: When it was published, ISO 8601, UTC.
        notices: What was lost on the way to it: those of its inputs, then its own. Never keyed.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    key: str
    kind: str
    recipe: dict[str, Any]
    files: dict[str, FileEntry]
    digest: str
    counts: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    schema: int = SCHEMA
    notices: tuple[Notice, ...] = ()


_MANIFEST = TypeAdapter(Manifest)


class Relied(BaseModel):
    """What commands rely on in a recipe: a manifest may come from elsewhere, and its seal is a hash."""

    step: str = ""
    params: dict[str, Any] = {}
    inputs: dict[str, str] = {}


def content_digest(files: dict[str, FileEntry], records: frozenset[str] = frozenset()) -> str:
    """Return the digest that stands for an artifact's content in the keys of what is made from it."""
    return sha256_of({name: entry.sha256 for name, entry in files.items() if name not in records})


def write_manifest(folder: Path, manifest: Manifest) -> Path:
    """Write the manifest, sealed with the hash of itself, and return its path.

    Raises:
        StoreError: If it is too large to be read again.
    """
    body = asdict(manifest)
    path, content = folder / NAME, json.dumps({"seal": sha256_of(body), **body}, indent=1, ensure_ascii=False).encode()
    if len(content) > MOST:
        raise StoreError(f"the manifest has {len(content):,} bytes, at most {MOST:,} are read", str(path))
    path.write_bytes(content)
    return path


def read_manifest(folder: Path) -> Manifest:
    """Read a folder's manifest.

    Raises:
        UnreadableManifest: If it is missing, cut, altered, or not of this schema.
    """
    try:
        body = read_json(folder / NAME)
        seal = body.pop("seal")
        if body["schema"] != SCHEMA:
            raise UnreadableManifest(f"manifest has schema {body['schema']!r}, this program knows {SCHEMA}")
        if seal != sha256_of(body):
            raise UnreadableManifest("manifest was altered: its seal does not match")
        made = _MANIFEST.validate_python(body)
        Relied.model_validate(made.recipe)
    except UnreadableManifest:
        raise
    except FileNotFoundError:
        raise UnreadableManifest("manifest is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnreadableManifest(f"manifest cannot be read: {type(error).__name__}") from error
    if made.key != sha256_of(made.recipe):
        raise UnreadableManifest("manifest's key is not the hash of its recipe")
    if odd := [name for name in made.files if name in {"", ".", "..", NAME} or {*name} & {"/", "\0"}]:
        raise UnreadableManifest(f"manifest names {odd[0]!r}, which is no file of its folder")
    return made
