"""Which functions are remembered: declared at the top of a step's module, where the guard of versions finds them.

A row outlives the code that made it, so a function has a version, which `tasks/versions.lock` holds beside digests of
the modules that it stands on. What it takes from packages (which characters are letters, which language a word is of)
changes with these: their versions are among its settings.
"""

from __future__ import annotations

import importlib.metadata
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

    Compute = Callable[[pa.StringArray], pa.RecordBatch]

UNICODE = "unicode"  # as a package: the tables that Python's strings and patterns go by


@dataclass(frozen=True)
class Function:
    """A pure function whose results are worth remembering.

    Attributes:
        name: Such as "gpt2-ids"; letters, digits and hyphens.
        version: Raised by a person when it gives something else.
        settings: JSON values that it depends on.
        least: Share of rows that were remembered together, from 0 to 1, below which it is cheaper to compute those
            that are asked for again than to read them all.
    """

    name: str
    version: int
    settings: Mapping[str, Any]
    least: float = field(default=0.0, kw_only=True)


@dataclass(frozen=True)
class PerText(Function):
    """A pure function of one text.

    Attributes:
        compute: N texts -> N rows in the same order, whatever else is in the chunk; 0 texts -> 0 rows. It can be
            pickled: a function of a module, or a `functools.partial` of one.
    """

    compute: Compute


@dataclass(frozen=True)
class Remembered:
    """The declaration of a function; its settings, and what computes, are known at the call.

    Attributes:
        name: As in `Function`.
        version: As in `Function`; the guard names the module that changed while it did not.
        module: Where it stands; named and not imported, since a step's module imports nothing heavy.
        packages: Whose versions decide its rows; UNICODE for Python's tables.
    """

    name: str
    version: int
    module: str
    packages: tuple[str, ...] = ()

    def of(self, compute: Compute, settings: Mapping[str, Any]) -> PerText:
        """Return the function of one text.

        Raises:
            ValueError: If what computes stands in another module than the guard watches.
        """
        found = getattr(compute, "func", compute).__module__  # of a partial: of its function
        if found != self.module:
            raise ValueError(f"{self.name} is declared of {self.module}, and computed by {found}")
        return PerText(self.name, self.version, self._all(settings), compute)

    def named(self, settings: Mapping[str, Any], least: float = 0.0) -> Function:
        """Return the function of what has names."""
        return Function(self.name, self.version, self._all(settings), least=least)

    def _all(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {**settings, "packages": {name: _version(name) for name in self.packages}}


def _version(package: str) -> str:
    return unicodedata.unidata_version if package == UNICODE else importlib.metadata.version(package)
