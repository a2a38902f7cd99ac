"""Dates in the usual published form, `2023-02-07T17:29:24.727400+00:00`, many at a time: digits as a table of bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

KIND = pa.timestamp("us", tz="UTC")
_FORM = np.frombuffer(b"0000-00-00T00:00:00.000000+00:00", np.uint8)
_DIGITS = np.flatnonzero(_FORM[:26] == ord("0"))  # 20 places: the zone stands as it is
_FIXED = np.setdiff1d(np.arange(_FORM.size), _DIGITS)
_PARTS = (4, 2, 2, 2, 2, 2, 6)  # digits of year, month, day, hour, minute, second, microsecond
_WEIGHTS = np.zeros((_DIGITS.size, len(_PARTS)))  # (20, 7) what a digit counts for a part; float64 is exact, and fast
_WEIGHTS[np.arange(_DIGITS.size), np.repeat(np.arange(len(_PARTS)), _PARTS)] = np.concatenate(
    [10.0 ** np.arange(size)[::-1] for size in _PARTS]
)
_LAST = np.array([0, 31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31])  # day of a month that every year has


def are_usual(dates: Sequence[str | None]) -> bool:
    """Tell whether every date is in the usual form: in UTC, of the years 1000 to 2999, and not 29 February."""
    return _microseconds([date for date in dates if date is not None]) is not None


def column(dates: Sequence[str | None]) -> pa.Array:
    """Return ISO 8601 dates in UTC as a column of timestamps."""
    given = np.array([date is not None for date in dates], dtype=bool)
    found = _microseconds([date for date in dates if date is not None])
    if found is None:  # a year or a day that is not usual
        return pa.array(dates, pa.string()).cast(KIND)
    values = np.zeros(len(dates), np.int64)
    values[given] = found
    return pa.array(values, mask=~given).view(KIND)


def _microseconds(dates: list[str]) -> np.ndarray | None:
    """Return (M,) int64 microseconds since 1970; None if one is not in the usual form."""
    text = "".join(dates).encode("utf-8", "surrogatepass")
    if set(map(len, dates)) - {_FORM.size} or len(text) != len(dates) * _FORM.size:
        return None
    table = np.frombuffer(text, np.uint8).reshape(-1, _FORM.size)  # (M, 32)
    digits = table[:, _DIGITS] - ord("0")  # a byte below "0" wraps around, over 9
    if (digits > 9).any() or (table[:, _FIXED] != _FORM[_FIXED]).any():
        return None
    year, month, day, hour, minute, second, micro = (digits @ _WEIGHTS).astype(np.int64).T
    if not (((year >= 1000) & (year < 3000) & (month >= 1) & (month <= 12)).all() and (hour < 24).all()):
        return None
    if not ((day >= 1) & (day <= _LAST[month]) & (minute < 60) & (second < 60)).all():
        return None
    days = ((year - 1970) * 12 + month - 1).astype("datetime64[M]").astype("datetime64[D]").astype(np.int64) + day - 1
    found: np.ndarray = (((days * 24 + hour) * 60 + minute) * 60 + second) * 1_000_000 + micro
    return found
