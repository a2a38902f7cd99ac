"""What was taken so far, in few bytes: enough to know, at the end, which trees came again or share a message."""

from __future__ import annotations

from array import array

import numpy as np

from tasks.oasst.reader import Found, Place


class Seen:
    """The trees taken so far, each a version of its tree: 8 bytes a message and about 0.15 KB a tree."""

    def __init__(self) -> None:
        self._messages, self._trees = array("q"), array("q")  # hashes of ids, 64 bits of each
        self._firsts, self._places = array("q"), array("q")  # first row; file, line and offset
        self._known: set[int] = set()

    def __len__(self) -> int:
        """Count the trees, not their versions."""
        return len(self._known)

    @property
    def versions(self) -> int:
        """Count the trees, each version of one for itself."""
        return len(self._firsts)

    def note(self, tree: Found) -> None:
        """Note a tree whose messages follow the rows noted before."""
        short = hash(tree.tree_id)
        self._known.add(short)
        self._trees.append(short)
        self._firsts.append(len(self._messages))
        self._places.extend(tree.place)
        self._messages.extend([*map(hash, tree.content.ids)])

    def place(self, version: int) -> Place:
        """Return where a version stood."""
        file, line, offset = self._places[3 * version : 3 * version + 3]
        return Place(file, line, offset)

    def rows(self, version: int) -> range:
        """Return the rows of a version."""
        end = self._firsts[version + 1] if version + 1 < len(self._firsts) else len(self._messages)
        return range(self._firsts[version], end)

    def doubtful(self) -> list[int]:
        """Return the versions whose tree, or one of whose messages, may also be that of another version."""
        messages, trees, firsts = (
            np.frombuffer(kept, np.int64) for kept in (self._messages, self._trees, self._firsts)
        )
        twice = np.isin(trees, _repeated(trees))
        rows = np.flatnonzero(np.isin(messages, again)) if (again := _repeated(messages)).size else again
        twice[np.searchsorted(firsts, rows, side="right") - 1] = True
        found: list[int] = np.flatnonzero(twice).tolist()
        return found


def _repeated(hashes: np.ndarray) -> np.ndarray:
    """Return what is there more than once."""
    ordered = np.sort(hashes)
    return np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
