"""Every error that Treeline raises on purpose, as one tree.

TreelineError                 70  our own bug, unless a subclass says otherwise
├── ParameterError             2  a setting, name or path that we refuse before any work
├── InputError                65  the data is bad: malformed, cut, changed, unusable
│   ├── SourceChanged         65  a pinned source no longer has the bytes that were pinned
│   └── GateError             65  encoded data that must not reach training
├── UnavailableError          69  a service (hub, server) did not answer
├── TrainingError             70  the run cannot go on: loss not finite, checkpoint unusable
│   └── RankLost              75  a process of a run of many died or hung too often; another try may do better
├── StoreError                74  an artifact could not be written or read; 73 where the store cannot be made
├── PermissionRefused         77  the system or a service denies access
└── ConfigurationError        78  this installation or environment cannot work

Each prints as one line: `error[code]: what. where. what to do`. The numbers are the exit codes of sysexits.h.
"""

from __future__ import annotations


class TreelineError(Exception):
    """An error with a code, a place and a way out.

    Args:
        what: What went wrong, with what was expected and what was found.
        where: The file, line, step or setting.
        hint: What the reader can do about it.
        code: A dotted name for machines, such as `gzip.truncated`; default: the class's own.
    """

    code = "internal"
    exit_code = 70

    def __init__(self, what: str, where: str = "", hint: str = "", code: str | None = None) -> None:
        super().__init__(what, where, hint, code)
        self.what, self.where, self.hint = what, where, hint
        self.code = code or type(self).code

    def __str__(self) -> str:
        parts = [part.strip().rstrip(".") for part in (self.what, self.where, self.hint) if part]
        line = " ".join(" ".join(f"{part}." for part in parts).split())
        return f"error[{self.code}]: {line}"


class ParameterError(TreelineError):
    """A setting, a name or a path that is refused before any work."""

    code = "param"
    exit_code = 2


class InputError(TreelineError):
    """Data that is malformed, cut short or unusable."""

    code = "input"
    exit_code = 65


class SourceChanged(InputError):
    """A pinned source that no longer has the bytes that were pinned."""

    code = "source.changed"


class GateError(InputError):
    """Encoded data that must not reach training; the message that caused it is named."""

    code = "encode.gate"


class UnavailableError(TreelineError):
    """A service that did not answer, after the retries that it deserved."""

    code = "unavailable"
    exit_code = 69


class TrainingError(TreelineError):
    """A training run that cannot go on."""

    code = "train"


class RankLost(TrainingError):
    """A process of a run of many that died or hung, more often than it may."""

    code = "train.rank"
    exit_code = 75


class StoreError(TreelineError):
    """An artifact that could not be written or read."""

    code = "store"
    exit_code = 74


class PermissionRefused(TreelineError):
    """The system or a service denies access."""

    code = "permission"
    exit_code = 77


class ConfigurationError(TreelineError):
    """This installation or environment cannot work as it is."""

    code = "config"
    exit_code = 78
