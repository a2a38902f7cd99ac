"""The files of what is remembered: their names, and whether they are what was written.

<root>/.memo/<function>-<12 hex>/    one function, in one version, with one set of settings
    about.json                       which; touched at each use
    <64 hex>.arrow                   a part: keys and rows, named by the sha256 of its content; written once
    .<mark>.part                     a part being written
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.store.canonical import sha256_file, sha256_of
from tasks.store.integrity import identity
from tasks.store.store import SHORT

if TYPE_CHECKING:
    import pyarrow as pa

FOLDER = ".memo"
ABOUT = "about.json"
_PART = re.compile(r"[0-9a-f]{64}\.arrow")
_MEMO = re.compile(rf"[A-Za-z0-9][A-Za-z0-9-]*-[0-9a-f]{{{SHORT}}}")


def memos(root: Path) -> list[Path]:
    """List the folders of memos, whole or not."""
    found = sorted((root / FOLDER).glob("*"))
    return [path for path in found if _MEMO.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]


def name_of(function: str, version: int, settings: Mapping[str, Any]) -> str:
    """Return the name of a memo's folder: the function's, and a digest of all that its rows depend on."""
    return f"{function}-{sha256_of(described(function, version, settings))[:SHORT]}"


def described(function: str, version: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that the rows of a memo depend on but the texts."""
    return {"function": function, "version": version, "settings": dict(settings)}


def memory_of(root: Path, name: str) -> Path:
    """Return the file that remembers which parts of a memo were hashed."""
    return root / ".verified" / f"memo-{name}.json"


def parts(folder: Path) -> list[Path]:
    """List what is named like a part."""
    return sorted(path for path in folder.glob("*.arrow") if _PART.fullmatch(path.name))


def fault(path: Path, hashed: Sequence[int] = ()) -> str | None:
    """Say what is wrong with a part; None, where its content is what its name says.

    Args:
        path: The part.
        hashed: Its identity when it was last hashed and found right; it is not hashed again if that is still its own.
    """
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return "is not a regular file"
        if list(hashed) == identity(path) or sha256_file(path) == path.name.removesuffix(".arrow"):
            return None
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return "is not what was written"


def united(batches: Iterable[pa.RecordBatch], rows: int, size: int) -> Iterator[pa.RecordBatch]:
    """Yield the rows of small batches in larger ones, of at most so many rows and bytes if no single one has more."""
    import pyarrow as pa

    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        together = [*waiting, batch]
        if waiting and (sum(map(len, together)) > rows or sum(one.nbytes for one in together) > size):
            yield pa.concat_batches(waiting)
            waiting = []
        waiting.append(batch)
    if waiting:
        yield pa.concat_batches(waiting)
