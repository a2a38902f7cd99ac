"""Which trees and messages came before: repeats, later versions, and ids that two trees claim."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import orjson

from tasks.oasst.dump import Found, Place
from tasks.oasst.fields import Fault, shown
from tasks.oasst.tree import EXTRA, ID


class Version(NamedTuple):
    """A version of a tree that was taken: digest of its known fields, where it stood, its rows of the table."""

    digest: bytes
    place: Place
    first: int
    rows: int


class Verdict(NamedTuple):
    """What a tree is: a repeat of the version before it, a later version that `replaces` that one, or (neither) new."""

    repeats: bool = False
    replaces: Version | None = None


class Seen:
    """The trees and messages taken so far: about 0.5 KB a tree and 0.1 KB a message, whatever their texts."""

    def __init__(self) -> None:
        self._versions: dict[str, Version] = {}
        self._owners: dict[int, str] = {}  # 64 bits of a message id's hash -> its tree

    def __len__(self) -> int:
        return len(self._versions)

    def take(self, tree: Found, first: int) -> Verdict:
        """Judge a tree, and note it, unless it is a repeat, as rows of the table from row `first` on.

        Raises:
            Fault: `id.duplicate`, if one of its messages is also in another tree. Then it is not noted.
        """
        before, digest = self._versions.get(tree.tree_id), _digest(tree)
        if before and before.digest == digest:
            return Verdict(repeats=True)
        shorts = [_short(row[ID]) for row in tree.rows]
        for short, row in zip(shorts, tree.rows, strict=True):
            owner = self._owners.get(short, tree.tree_id)
            if owner != tree.tree_id:
                raise Fault("id.duplicate", f"expected {shown(row[ID])} in one tree, got it in {shown(owner)}, too")
        self._owners.update(dict.fromkeys(shorts, tree.tree_id))
        self._versions[tree.tree_id] = Version(digest, tree.place, first, len(tree.rows))
        return Verdict(replaces=before)


def _digest(tree: Found) -> bytes:
    """Return 16 bytes that stand for a tree's known fields: all columns but the last, `extra`."""
    return hashlib.sha256(orjson.dumps([row[:EXTRA] for row in tree.rows])).digest()[:16]


def _short(message_id: str) -> int:
    return int.from_bytes(hashlib.sha256(message_id.encode()).digest()[:8], "big")
