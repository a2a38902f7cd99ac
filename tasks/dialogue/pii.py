"""Personal data in texts, by their shape: e-mail addresses, phone numbers, IP addresses and card numbers.

A shape alone is cheap to imitate, so each is checked further: card numbers by their prefix, length and Luhn's sum,
phone numbers by how numbers are written, addresses by what they may hold. What can be nobody's is left alone: addresses
of one's own machine, network masks, versions of programs. So four small numbers (8.8.8.8) are taken for a version, and
ten digits without a gap or a plus for a number of anything.

All patterns are bounded, so a text of a megabyte takes time in proportion.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from ipaddress import ip_address
from itertools import compress

import polars as pl
import pyarrow as pa

SCHEMA = pa.schema([("personal", pa.string()), ("masked", pa.string())])

_EMAIL = re.compile(
    r"(?i)(?<![\w.%+-])[\w%+-](?:[\w.%+-]{0,62}[\w%+-])?@(?:[^\W_](?:(?:[^\W_]|-){0,61}[^\W_])?\.){1,8}[^\W\d_]{2,24}"
    r"(?![\w@-])"
)
_LOCAL = re.compile(r"[\w.%+-]*")  # what stands before the @ of an address: all of it, since nothing like it precedes
_LONGEST_LOCAL = 64
_CARD = re.compile(r"(?<![\w.,$€£#/+-])(?<!\d )\d(?:[ -]?\d){12,18}(?![ -]?\d|[\w/]|[.,]\d)")
_PHONE = re.compile(
    r"""(?x) (?<![\w.,/#&?+-])(?<!\d[ ])(?:
      \+[1-9]\d{0,2}(?:[ .-]?\(0?\d{1,4}\))?(?:[ .-]?\d{2,5}){2,5}             # +44 20 7946 0958
    | 00[1-9]\d{0,2}[ .-]\d{1,4}(?:[ .-]?\d{2,5}){1,4}                         # 0044 20 7946 0958
    | (?:1[ .-])?\(\d{3}\)[ ]?\d{3}[ .-]\d{4}                                  # (415) 555-0123
    | (?:1[ .-])?(?:\d{3}-\d{3}-|[2-9]\d\d(?P<gap>[ .])[2-9]\d\d(?P=gap))\d{4} # 415-555-0123
    | 0[1-9]\d{1,3}[ ]?/[ ]?\d{5,8}                                            # 030/1234567
    ) (?![\w]|[.,:/=-]\d|[ ]\d)"""
)
_IPV4 = re.compile(r"(?<![\w.-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\w|/\d)")  # with a mask it is a network
_IPV6 = re.compile(r"(?i)(?<![\w:.])[0-9a-f]{1,4}:(?:[0-9a-f]{0,4}:){1,6}[0-9a-f]{0,4}(?![\w:])")
# Before four numbers that are a version or a section, not an address.
_NO_ADDRESS = re.compile(r"(?:\bv(?:er)?\.?|\bversions?|\bsections?|\bchapters?|\brelease|\bbuild|§)[ :=]{0,2}$", re.I)
# Visa, Mastercard, American Express, Diners, JCB, Discover; the prefixes and lengths that are issued today.
_CARDS = re.compile(
    r"4\d{15}(?:\d{3})?|(?:5[1-5]|2[2-7])\d{14}|3[47]\d{13}|3(?:0[0-5]|[68]\d)\d{11}|35\d{14}|6(?:011|5\d\d|4[4-9]\d)\d{12}"
)
_UNITS = (".service", ".socket", ".target", ".timer", ".mount")  # of systemd: getty@tty1.service is no address


def _is_email(text: str, before: str) -> bool:
    return ".." not in text and not text.lower().endswith(_UNITS)


def _is_card(text: str, before: str) -> bool:
    digits = re.sub(r"\D", "", text)
    return bool(_CARDS.fullmatch(digits)) and luhn(digits)


def _is_phone(text: str, before: str) -> bool:
    digits = re.sub(r"\D", "", text)
    least = 7 if re.search(r"[ .()/-]", text) else 10  # after a plus, a sum could stand as well
    return least + text.startswith("00") * 2 <= len(digits) <= 15 and len({*digits}) > 2


def _is_address(text: str, before: str) -> bool:
    """Tell whether it is the address of a machine that could be somebody's: no mask, no version, not one's own."""
    try:
        found = ip_address(text)
    except ValueError:
        return False
    if found.version == 4:
        first = found.packed[0]
        return 0 < first < 224 and first != 127 and max(found.packed) > 9 and not _NO_ADDRESS.search(before)
    return found.packed[0] >> 5 == 1 or found.is_link_local or found.packed[0] in {0xFC, 0xFD}


KINDS: dict[str, tuple[re.Pattern[str], Callable[[str, str], bool]]] = {
    "e-mail": (_EMAIL, _is_email),
    "card number": (_CARD, _is_card),
    "IP address": (_IPV4, _is_address),
    "IPv6 address": (_IPV6, _is_address),
    "phone": (_PHONE, _is_phone),
}
# What is in every text that holds one of a kind; only such texts are searched for it, 1 in 100 or fewer.
_HINTS = {
    "e-mail": r"\w@\w",
    "card number": r"\d(?:[ -]?\d){12}",
    "IP address": r"\d\.\d{1,3}\.\d{1,3}\.\d",
    "IPv6 address": r"[0-9A-Fa-f]:[0-9A-Fa-f:]*:",
    "phone": r"\+[1-9][\d .()-]{6}|00[1-9]\d{0,2}[ .-]\d|\d{3}[ .-]\d{4}|0\d{2,4} ?/ ?\d{5}",
}


def luhn(digits: str) -> bool:
    """Tell whether the check digit of a number fits. Source: ISO/IEC 7812-1, annex B."""
    doubled = [int(digit) * (1 + at % 2) for at, digit in enumerate(reversed(digits))]
    return sum(value - 9 * (value > 9) for value in doubled) % 10 == 0


def spans(text: str, kinds: Collection[str] = tuple(KINDS)) -> Iterator[tuple[int, int, str]]:
    """Yield what is personal in a text: start, stop and kind, in order, never overlapping.

    Of two readings of the same place the earlier kind in KINDS counts.
    """
    found: list[tuple[int, int, str]] = []
    taken = bytearray(len(text))
    for kind in kinds:
        pattern, holds = KINDS[kind]
        for match in _emails(text) if pattern is _EMAIL else pattern.finditer(text):
            start, stop = match.span()
            if not any(taken[start:stop]) and holds(match.group(), text[max(0, start - 16) : start]):
                taken[start:stop] = b"x" * (stop - start)
                found.append((start, stop, kind))
    yield from sorted(found)


def _emails(text: str) -> Iterator[re.Match[str]]:
    """Yield what `_EMAIL` finds, looking before each @ only: else each word would be tried as the start of one."""
    done, at = 0, text.find("@")
    while at >= 0:
        before = text[max(0, at - _LONGEST_LOCAL - 1) : at][::-1]
        start = at - _LOCAL.match(before).end()  # type: ignore[union-attr]  # it matches nothing at all, too
        match = _EMAIL.match(text, start) if done <= start < at else None
        if match:
            yield match
        done = match.end() if match else done
        at = text.find("@", max(done, at + 1))


def masked(text: str, kinds: Collection[str] = tuple(KINDS)) -> tuple[str, str]:
    """Return a text with each personal part replaced by its kind, such as `[e-mail]`, and how many of each it held."""
    pieces, end, found = [], 0, Counter[str]()
    for start, stop, kind in spans(text, kinds):
        pieces += [text[end:start], f"[{kind}]"]
        found[kind] += 1
        end = stop
    return "".join([*pieces, text[end:]]), ", ".join(f"{kind} {found[kind]}" for kind in KINDS if found[kind])


def scan(texts: pa.StringArray) -> pa.RecordBatch:
    """Find what is personal in each text.

    Args:
        texts: (N,) any texts.

    Returns:
        (N,) `personal`, such as `e-mail 2, phone 1`, and `masked`, the text without it; both null where nothing is.
    """
    read = pl.Series("text", texts, dtype=pl.String)
    hinted = read.to_frame().select(pl.col("text").str.contains(_HINTS[kind]).alias(kind) for kind in KINDS)
    rows = hinted.select(pl.any_horizontal(pl.all())).to_series().arg_true()
    found = [("", "")] * len(read)
    for row, text, hints in zip(rows.to_list(), read.gather(rows).to_list(), hinted[rows].rows(), strict=True):
        found[row] = masked(text, [*compress(KINDS, hints)])
    return pa.RecordBatch.from_arrays(
        [
            pa.array([seen or None for _, seen in found], pa.string()),
            pa.array([text if seen else None for text, seen in found], pa.string()),
        ],
        schema=SCHEMA,
    )
