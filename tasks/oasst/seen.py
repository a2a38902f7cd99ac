"""Which trees and messages came before: repeats, later versions, and ids that two trees claim."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from msgspec import msgpack

from tasks.oasst.dump import Found, Place
from tasks.oasst.fields import Fault, shown


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
        self._packed = bytearray()  # a tree, to be hashed; kept for its memory

    def __len__(self) -> int:
        return len(self._versions)

    def take(self, tree: Found, first: int) -> Verdict:
        """Judge a tree, and note it, unless it is a repeat, as rows of the table from row `first` on.

        Raises:
            Fault: `id.duplicate`, if one of its messages is also in another tree. Then it is not noted.
        """
        before, digest = self._versions.get(tree.tree_id), self._digest(tree)
        if before and before.digest == digest:
            return Verdict(repeats=True)
        owners, tree_id = self._owners, tree.tree_id
        shorts = dict.fromkeys([hash(message.message_id) for message in tree.content.messages], tree_id)
        if not owners.keys().isdisjoint(shorts):
            self._refuse_foreign(tree)
        owners.update(shorts)
        self._versions[tree_id] = Version(digest, tree.place, first, len(tree.content.messages))
        return Verdict(replaces=before)

    def _refuse_foreign(self, tree: Found) -> None:
        for message in tree.content.messages:
            owner = self._owners.get(hash(message.message_id), tree.tree_id)
            if owner != tree.tree_id:
                said = f"expected {shown(message.message_id)} in one tree, got it in {shown(owner)}, too"
                raise Fault("id.duplicate", said)

    def _digest(self, tree: Found) -> bytes:
        """Return 16 bytes that stand for a tree's known fields: all columns but the last, `extra`."""
        rest = [(at, kept.events, kept.origin) for at, kept in tree.content.rest.items() if kept.events or kept.origin]
        _encode_into([tree.content.messages, rest], self._packed)
        return hashlib.sha256(self._packed).digest()[:16]


_encode_into = msgpack.Encoder().encode_into
