"""Instants: many dates at a time are taken as one regular expression and the standard library take each of them."""

from __future__ import annotations

import re
from datetime import UTC, datetime

import pyarrow as pa
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tasks.oasst.timestamps import KIND, column, microseconds, since_1970

DAY = "(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)"
USUAL = re.compile(rf"[12][0-9]{{3}}-{DAY}T(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]\.[0-9]{{6}}\+00:00")
DATE = "2023-02-07T17:29:24.727400+00:00"
DATES = st.datetimes().map(lambda date: date.replace(tzinfo=UTC).isoformat(timespec="microseconds"))


@settings(max_examples=300)
@given(st.lists(DATES, max_size=4), st.integers(0, 31), st.text(max_size=2))
@example([DATE], 0, "3")
@example([DATE], 9, "9")
@example([DATE], 31, "١")
@example([DATE], 31, "\ud800")
@example([], 0, "")
def test_dates_are_usual_exactly_where_the_expression_says_so(dates: list[str], place: int, put: str) -> None:
    changed = [date[:place] + put + date[place + len(put) :] for date in dates]
    for some in (dates, changed):
        found = microseconds(some)
        assert (found is not None) == all(USUAL.fullmatch(date) for date in some)
        assert found is None or found.tolist() == [since_1970(datetime.fromisoformat(date)) for date in some]


@given(st.lists(DATES | st.none(), max_size=5))
def test_a_column_holds_the_instants_as_arrow_itself_reads_them(dates: list[str | None]) -> None:
    found = column([None if date is None else since_1970(datetime.fromisoformat(date)) for date in dates])
    assert found.equals(pa.array(dates, pa.string()).cast(KIND))
