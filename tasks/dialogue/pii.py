"""Personal data in texts, by their shape: e-mail addresses, phone numbers, IP addresses and card numbers.

A shape alone is cheap to imitate, so each is checked further: card numbers by their prefix, length and Luhn's sum,
phone numbers by how numbers are written, addresses by what they may hold. What can be nobody's is left alone: domains,
numbers and addresses that are kept free for examples, films and private networks, numbers that are free to call,
network masks, versions of programs, products of matrices (`x@w.T`), remote folders. So four small numbers (8.8.8.8) are
taken for a version, ten digits without a gap or a plus for a number of anything, and so are groups of digits that begin
with a single 0 (020 7946 0958).

All patterns are bounded, so a text of a megabyte takes time in proportion.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from ipaddress import ip_address
from itertools import compress

import polars as pl
import pyarrow as pa

SCHEMA = pa.schema([("personal", pa.string()), ("masked", pa.string())])

_EMAIL = re.compile(
    r"(?i)(?<![\w.%+-])[\w%+-](?:[\w.%+-]{0,62}[\w%+-])?@(?:[^\W_](?:(?:[^\W_]|-){0,61}[^\W_])?\.){1,8}[^\W\d_]{2,24}"
    r"(?!_{0,3}[^\W_]|-[^\W_]|@)"  # after it may stand what ends a phrase: _a@b.io_ in italics
)
_LOCAL = re.compile(r"[\w.%+-]*")  # what stands before the @ of an address: all of it, since nothing like it precedes
_LONGEST_LOCAL = 64
# An address that continues as a product does: x@layer.forward(y), x@w.part[0], x@w.part.T.
_CODE = re.compile(r"[(\[]|\.[TH]\b")
_FOLDER = re.compile(r":(?!\d+/)(?:[\w.~-]{0,64}/|[\w.-]{1,64}\.git\b)")  # host:group/name, host:/srv, host:name.git
# Where an address may end, whatever follows, and where none does. Top domains are over a thousand, so a list of all
# that count would lose addresses; what ends a product, or names a picture, is the shorter list.
_USUAL = {
    "com", "org", "net", "edu", "gov", "io", "de", "uk", "fr", "it", "es", "nl", "pl", "eu", "ca", "au", "jp",
    "cn", "in", "br", "ru", "us", "ch",
}  # fmt: skip
_NO_DOMAIN = {
    "mT", "mH", "inv", "pinv", "transpose", "permute", "weight", "weights", "bias", "kernel", "matrix", "array",
    "tensor", "data", "grad", "coef", "coefs", "value", "values", "real", "imag", "conj", "adjoint", "reshape",
    "view", "contiguous", "proj", "head", "shape", "png", "jpg", "jpeg", "gif", "svg", "webp", "js", "ts",
}  # fmt: skip
# Nobody's mail. Source: RFC 2606 and RFC 6761.
_EXAMPLE = re.compile(r"(?i)(?:.*[@.])?(?:example(?:\.(?:com|org|net))?|test|invalid|localhost)$")
_CARD_RUN = re.compile(r"(?<![\w.,$€£#/+-])(?<!\d )\d(?=(?:[ -]?\d){12})")  # where digits begin
_CARD = re.compile(r"\d(?:[ -]?\d){12,18}(?![ -]?\d|[\w/]|[.,]\d)")
_GROUPED = r"(?:\d{4}(?:\d{12}|(?: \d{4}){3}|(?:-\d{4}){3})|3[47]\d\d(?:\d{11}|[ -]\d{6}[ -]\d{5}))"
# Before what may follow it after a space: its last month, its check number, another card.
_CARD_BEFORE = re.compile(
    rf"{_GROUPED}(?= (?:\d\d/\d\d|\d{{3}}(?:(?![ -]?\d|[\w/]|[.,]\d)| \d\d/\d\d)|{_GROUPED}(?!\d)))"
)
_CARD_LIKE = re.compile(rf"{_GROUPED}(?!\d)")
_PHONE = re.compile(
    r"""(?x) (?<![\w.,/#&?+-])(?<!\d[ ])(?:
      \+1[ .-]?(?:\d{3}|\(\d{3}\))[ .-]?\d{3}[ .-]?\d{4}                           # +1 415 555 0123
    | (?:\+[1-9]\d{0,14}|\(\+[1-9]\d{0,2}\)\d{0,8}|00[1-9]\d{0,2}(?=[ ./(-]))       # +44, (+44), 0044
      (?:[ .-]?\(\d{1,5}\)[ ]?\d{1,8} | (?<=\d\d|\d\))[ -]\d(?=[ ./-]))?            # (0)20; 1, as in Paris
      (?:(?:[ .-]|[ ]?/[ ]?)\d{2,12}){0,6} (?:-\d)? (?![ ]\d(?:\d|[ ]\d))            # 7946 0958; -0, to the desk
    | (?:1[ .-])?\(\d{3}\)[ ]?\d{3}[ .-]\d{4}                                       # (415) 555-0123
    | (?:1[ .-])?\d{3}-\d{3}-\d{4}                                                 # 415-555-0123
    | (?:1[ .-])?[2-9]\d\d(?P<gap>[ .])[2-9]\d\d(?P=gap)\d{4}(?![ ]\d)             # 415 555 0123
    | 0[1-9]\d{1,3}[ ]?/[ ]?\d{5,8}(?:-\d{1,4})?(?![ ]\d)                          # 030/1234567
    ) (?![\w]|[.,:/=-]\d)"""
)
# Numbers of North America that are nobody's: of the exchange 555, as in films, and free to call, as a lifeline.
_NOBODYS = re.compile(r"1?(?:[2-9]\d\d555\d{4}|8(?:00|33|44|55|66|77|88)[2-9]\d{6})")
_AREA_OF_ONE = re.compile(r"\D*\d{2,5}\D{1,2}\d[ ./-]")  # as in Paris, Tokyo and Dublin
_IPV4 = re.compile(r"(?<![\w.-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\w|/\d)")  # with a mask it is a network
_IPV6 = re.compile(r"(?i)(?<![\w:.])[0-9a-f]{1,4}:(?:[0-9a-f]{0,4}:){1,6}(?:[0-9a-f]{1,4}|(?<=::))(?!\w|:[\w:])")
# Before four numbers that are a version or a section, not an address.
_NO_ADDRESS = re.compile(r"(?:\bv(?:er)?\.?|\bversions?|\bsections?|\bchapters?|\brelease|\bbuild|§)[ :=]{0,2}$", re.I)
# Visa, Mastercard, American Express, Diners, JCB, Discover; the prefixes and lengths that are issued today.
_CARDS = re.compile(
    r"4\d{15}(?:\d{3})?|(?:5[1-5]|2[2-7])\d{14}|3[47]\d{13}|3(?:0[0-5]|[68]\d)\d{11}|35\d{14}|6(?:011|5\d\d|4[4-9]\d)\d{12}"
)
_UNITS = (".service", ".socket", ".target", ".timer", ".mount")  # of systemd: getty@tty1.service is no address


# Spaces and hyphens that keep a number on one line, each a character as its plain one, so that places stay.
_PLAIN = {0xA0: " ", 0x202F: " ", 0x2010: "-", 0x2011: "-"}


def _is_email(found: re.Match[str]) -> bool:
    """Tell whether it is an address, and no product of matrices, remote folder, picture or unit of systemd."""
    text, rest = found.group(), (found.string, found.end())
    name, domain = text.split("@")
    last = domain.rsplit(".", 1)[1]
    if _EXAMPLE.match(domain):
        return False
    if ".." in text or name == "git" or last in _NO_DOMAIN or text.lower().endswith(_UNITS) or _FOLDER.match(*rest):
        return False
    return last.lower() in _USUAL or not (domain.startswith(("self.", "cls.")) or _CODE.match(*rest))


def _is_card(found: re.Match[str]) -> bool:
    digits = re.sub(r"\D", "", found.group())
    return bool(_CARDS.fullmatch(digits)) and luhn(digits)


def _is_phone(found: re.Match[str]) -> bool:
    text = found.group()
    digits = re.sub(r"\D", "", text)
    abroad, own = text.startswith(("+", "(+", "00")), digits.removeprefix("00")
    if _NOBODYS.fullmatch(own) and (not abroad or own.startswith("1")):
        return False
    least = 7 if re.search(r"[ .()/-]", text) else 10  # after a plus, a sum could stand as well
    if abroad and ("/" in text or _AREA_OF_ONE.match(text)):
        least = 9  # so could a date, and numbers in a row
    return least + text.startswith("00") * 2 <= len(digits) <= 15 and len({*digits}) > 2


def _is_address(match: re.Match[str]) -> bool:
    """Tell whether it is the address of a machine that could be somebody's: no mask, no version, not a private one."""
    try:
        found = ip_address(match.group())
    except ValueError:
        return False
    if not found.is_global or found.is_multicast:
        return False
    if found.version == 6:
        return found.packed[0] >> 5 == 1  # the others are given to nobody
    before = match.string[max(0, match.start() - 16) : match.start()]
    return max(found.packed) > 9 and not _NO_ADDRESS.search(before)


# What is in every text that holds one of a kind; only such texts are searched for it, 1 in 100 or fewer.
_GAP = " \u00a0\u202f\u2010\u2011-"  # in a class: the space, the hyphen, and what _PLAIN makes them
_HINTS = {
    "e-mail": rf"[\w%+{_GAP}]@\w",
    "card number": rf"\d(?:[{_GAP}]?\d){{12}}",
    "IP address": r"\d\.\d{1,3}\.\d{1,3}\.\d",
    "IPv6 address": r"[0-9A-Fa-f]:[0-9A-Fa-f:]*:",
    "phone": rf"\+[1-9][\d.()/{_GAP}]{{6}}|00[1-9]\d{{0,2}}[./({_GAP}]|\d{{3}}[.{_GAP}]\d{{4}}"
    rf"|0\d{{2,4}}[{_GAP}]?/[{_GAP}]?\d{{5}}",
}


def luhn(digits: str) -> bool:
    """Tell whether the check digit of a number fits. Source: ISO/IEC 7812-1, annex B."""
    doubled = [int(digit) * (1 + at % 2) for at, digit in enumerate(reversed(digits))]
    return sum(value - 9 * (value > 9) for value in doubled) % 10 == 0


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


def _cards(text: str) -> Iterator[re.Match[str]]:
    """Yield card numbers, also several in a row; of such a row all have to be some, or it is a list of numbers."""
    for run in _CARD_RUN.finditer(text):
        row, at = [], run.start()
        while found := _card(text, at):
            row.append(found)
            at = found.end() + 1 if text.startswith(" ", found.end()) else len(text)
        if not _CARD_LIKE.match(text, at):
            yield from row


def _card(text: str, at: int) -> re.Match[str] | None:
    """Return the card number that stands there: all the digits, else those before what a card's may be followed by."""
    readings = _CARD.match(text, at), _CARD_BEFORE.match(text, at)
    return next((found for found in readings if found and _is_card(found)), None)


# How each is found, and what tells whether it is one.
KINDS: dict[str, tuple[Callable[[str], Iterable[re.Match[str]]], Callable[[re.Match[str]], bool]]] = {
    "e-mail": (_emails, _is_email),
    "card number": (_cards, _is_card),
    "IP address": (_IPV4.finditer, _is_address),
    "IPv6 address": (_IPV6.finditer, _is_address),
    "phone": (_PHONE.finditer, _is_phone),
}


def spans(text: str, kinds: Collection[str] = tuple(KINDS)) -> Iterator[tuple[int, int, str]]:
    """Yield what is personal in a text: start, stop and kind, in order, never overlapping.

    Of two readings of the same place the earlier kind in KINDS counts.
    """
    found: list[tuple[int, int, str]] = []
    taken = bytearray(len(text))
    plain = text if text.isascii() else text.translate(_PLAIN)
    for kind in kinds:
        find, holds = KINDS[kind]
        for match in find(plain):
            start, stop = match.span()
            if not any(taken[start:stop]) and holds(match):
                taken[start:stop] = b"x" * (stop - start)
                found.append((start, stop, kind))
    yield from sorted(found)


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
