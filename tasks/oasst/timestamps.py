"""Dates in the usual published form, `2023-02-07T17:29:24.727400+00:00`, many at a time: digits as a table of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa

_START = datetime(1970, 1, 1, tzinfo=UTC)
KIND = pa.timestamp("us", tz="UTC")
_FORM = b"0000-00-00T00:00:00.000000+00:00"
_LEAST = np.frombuffer(_FORM, np.uint8)
_SPAN = np.frombuffer(b"2999.19.39.29.59.59.999999......".replace(b".", b"0"), np.uint8) - ord("0")  # above the least
_PARTS = {0: 4, 5: 2, 8: 2, 11: 2, 14: 2, 17: 2, 20: 6}  # where year, month, ... microsecond start: digits
_WEIGHTS = np.zeros((len(_FORM), len(_PARTS)))  # (32, 7) what a digit counts for a part; float64 is exact, and fast
for _part, (_start, _size) in enumerate(_PARTS.items()):
    _WEIGHTS[_start : _start + _size, _part] = 10.0 ** np.arange(_size)[::-1]
_LAST = np.array([0, 31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31])  # day of a month that every year has
_UNITS = np.array([3_600_000_000, 60_000_000, 1_000_000, 1])  # microseconds of hour, minute, second, microsecond


def column(instants: Sequence[int | None]) -> pa.Array:
    """Return microseconds since 1970 as a column of timestamps."""
    return pa.array(instants, pa.int64()).view(KIND)


def since_1970(date: datetime) -> int:
    """Return the microseconds of one date, of any year."""
    return (date - _START) // timedelta(microseconds=1)


def microseconds(dates: Sequence[str]) -> np.ndarray | None:
    """Return (M,) int64 microseconds since 1970; None if one is not in the usual form.

    That is: in UTC, with six digits of a second, of the years 1000 to 2999, and not 29 February.
    """
    text = "".join(dates).encode("utf-8", "surrogatepass")
    if set(map(len, dates)) - {len(_FORM)} or len(text) != len(dates) * len(_FORM):
        return None
    digits = np.frombuffer(text, np.uint8).reshape(-1, len(_FORM)) - _LEAST  # (M, 32), below the least: wraps around
    if (digits > _SPAN).any():
        return None
    parts = (digits @ _WEIGHTS).astype(np.int64)  # (M, 7)
    year, month, day, hour = parts.T[:4]
    if not ((year >= 1000) & (month >= 1) & (month <= 12) & (hour < 24)).all():
        return None
    if not ((day >= 1) & (day <= _LAST[month])).all():
        return None
    days = ((year - 1970) * 12 + month - 1).astype("datetime64[M]").astype("datetime64[D]").astype(np.int64) + day - 1
    found: np.ndarray = days * (24 * _UNITS[0]) + parts[:, 3:] @ _UNITS
    return found
