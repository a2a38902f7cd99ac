"""Laws of the scan for personal data: what was planted is found in full, and what only looks like it stays."""

import json
import random
import time
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.dialogue.pii import _EMAIL, KINDS, SCHEMA, _emails, luhn, masked, scan, spans

PLANTED = {
    "e-mail": ["jane.doe@gmail.com", "a@b.io", "first+tag@mail.example.co.uk", "j@example.community", "j@myexample.com",
               "me@testing.de", "x_y-z%1@sub-domain.museum",
               "joe@münchen.de", "анна@почта.рф", "hello@openai.fund", "me@self.com"],
    "phone": ["+44 20 7946 0958", "+1-415-556-0123", "(415) 556-0123", "415-556-0123", "415.556.0123", "1-806-273-8255",
              "+49 (0)30 901820", "0049 30 901820", "+4930901820123", "(123) 456-7890", "123-456-7890", "030/1234567",
              "0171 / 5551234", "030/5551234",
              "+49 555 5551234", "030/1234567-0", "+49 30 123456-0", "+49 30 / 1234567", "+49/30/1234567",
              "+49 (0)30/1234567", "(+49) 30 1234567", "0049 (0)30 123456", "+48 123456789", "+33 1 42 68 53 00",
              "+81 3 1234 5678", "+81 3-3466-5224", "+353 1 234 5678", "+61 2 9876 5432",
              "+33\u00a01\u202f42\u00a068\u00a053\u00a000", "+1\u2011415\u2011556\u20110123", "415\u2011556\u20110123",
              "(415)\u00a0556\u20100123"],
    "IP address": ["203.1.113.7", "193.168.1.10", "11.0.0.1", "8.8.44.210"],
    "IPv6 address": ["2001:470::8a2e:370:7334", "2001:0470:85a3:0000:0000:8a2e:0370:7334", "2a02::1ff:fe23:4567:890a"],
    "card number": ["4111 1111 1111 1111", "4111-1111-1111-1111", "5500005555555559", "3782 822463 10005",
                    "6011000990139424", "3530111333300000", "30569309025904", "2223003122003222",
                    "4111\u00a01111\u00a01111\u00a01111"],
}  # fmt: skip
CASES = [(kind, text) for kind, texts in PLANTED.items() for text in texts]
NOBODYS = [
    "you@example.com", "jane.doe@example.org", "a@mail.example.net", "x@example.com", "me@host.test", "me@site.invalid",
    "me@dev.localhost", "+1 415 555 0123", "(212) 555-0100", "555-555-0143", "415.555.0123", "415\u2011555\u20110123",
    "001 415-555-0123",
    "1-800-273-8255", "+1 888 273 8255", "(800) 273-8255", "192.168.0.1", "10.0.0.1", "172.16.20.30", "169.254.10.20",
    "127.0.0.53", "192.0.2.11", "198.51.100.23", "203.0.113.7", "2001:db8::8a2e:370:7334", "fe80::1ff:fe23:4567:890a",
    "fd12:3456:789a::1", "::1",
]  # fmt: skip
INNOCENT = [
    *NOBODYS,
    "version 10.15.7.2", "v2.0.10.1", "section 3.2.10.4", "255.255.255.0", "127.0.0.1", "1.2.3.4", "10.0.0.0/8",
    "0.0.0.0", "12:34:56", "std::vector::size", "a::b", "::", "00:1B:44:11:3A:B7", "2023-01-02 12:34:56", "1990-2023",
    "3.14159265358979",
    "1234567812345678", "4111111111111112", "1,234,567,890,123,456", "0.4111111111111111", "4111 1111 1111 1111 1111",
    "a@b", "@someone", "user@localhost", "getty@tty1.service", "x = y@z", "100 200 3000", "555-1234", "+1", "+100 -200",
    "1000000000", "978-3-16-148410-0", "ISBN 0-306-40615-2", "call 911", "$1,000,000 - 2,000,000",
    "1 2 3 4 5 6 7 8 9 10",
    "8.8.8.8", "4155550123", "01/2023", "1920/1080", "id=4155550123",
    "scores = q@k.transpose(-2, -1); y = x@self.weight.T", "A@A.inv()", "x@self.weight", "h@w.mT", "h@model.body.T",
    "q@layer.forward(x)", "b@w.part[0]", "git@github.com:org/repo.git", "me@host.example.com:/srv/www", "logo@2x.png",
    "me@host.example.com:site.git", "+1.5 200 300", "+10/20/2030", "+1 2 34 567", "+10 5 20 30",
    "GMT +1 2023-01-02 12:00",
    "12:34:56: error", "2001:db8::1::2: no", "10\u00a0000\u00a0000", "2023\u201101\u201102",
    "4500 4600 4700 4800 4900 5000 5100 5200 5300", "4111 1111 1111 1111 4111 1111 1111 1112",
    "id=4111111111111112", "2+2=4", "550e8400-e29b-41d4-a716-446655440000", "1/2/2023", "+1000000000000",
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text"), CASES)
@pytest.mark.parametrize(
    "around", ["{}", "Write to {}.", "({})", "tel:{}", "<{}>, please", "я: {}!", '"{}"\n', "{} or {}"]
)
def test_what_was_planted_is_found_and_masked(kind: str, text: str, around: str) -> None:
    count = around.count("{}")
    if not (kind == "IPv6 address" and around == "tel:{}"):  # a colon before it could be its own
        assert masked(around.format(*[text] * count)) == (around.format(*[f"[{kind}]"] * count), f"{kind} {count}")


@pytest.mark.parametrize("text", INNOCENT)
def test_what_only_looks_like_it_stays(text: str) -> None:
    for around in ("{}", "It is {} here.", "({})"):
        assert masked(around.format(text)) == (around.format(text), "")


def test_a_card_number_that_a_form_or_an_address_gives_is_found() -> None:
    assert masked("?card=4111111111111111&x=1") == ("?card=[card number]&x=1", "card number 1")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4111 1111 1111 1111 12/25", "[card number] 12/25"),
        ("4111-1111-1111-1111 12/25 123", "[card number] 12/25 123"),
        ("4111 1111 1111 1111 123.", "[card number] 123."),
        ("4111 1111 1111 1111 5500005555555559 3782 822463 10005", "[card number] [card number] [card number]"),
        ("+1 415 556 0123 2 times", "[phone] 2 times"),
        ("415-556-0123 24 hours", "[phone] 24 hours"),
        ("+49 30 901820 2 times", "[phone] 2 times"),
        ("Server 2001:470::1: refused", "Server [IPv6 address]: refused"),
        ("_john@b.com_", "[e-mail]_"),  # an underscore may begin an address
        ("john@b.com- yes", "[e-mail]- yes"),
        ("john@b.com(home)", "[e-mail](home)"),
    ],
)
def test_what_follows_does_not_hide_what_is_personal(text: str, expected: str) -> None:
    assert masked(text)[0] == expected


def test_planted_cases_are_found_in_real_texts_and_nothing_else_is_changed(shared: Path) -> None:
    real = [
        text for line in (shared / "data/en_100_tree.jsonl").open() for text in texts_of(json.loads(line)["prompt"])
    ]
    clean = [text for text in real if not [*spans(text)]]
    assert len(clean) > 0.995 * len(real)
    draw = random.Random(7)
    for at, text in enumerate(clean):
        kind, planted = CASES[at % len(CASES)]
        place = draw.choice([0, *(at + 1 for at, c in enumerate(text) if c == "\n"), len(text)])
        whole = [f"{text[:place]}\n{piece}\n{text[place:]}" for piece in (planted, f"[{kind}]")]
        assert masked(whole[0]) == (whole[1], f"{kind} 1")


def texts_of(node: dict) -> list[str]:  # type: ignore[type-arg]
    return [node["text"], *(text for reply in node.get("replies") or [] for text in texts_of(reply))]


def test_a_result_is_of_its_own_text_alone_and_null_where_nothing_is_found() -> None:
    batch = scan(pa.array(["Hello", "a@b.io and c@d.io, 415-556-0123", ""]))
    assert batch.schema == SCHEMA
    assert batch.to_pydict() == {
        "personal": [None, "e-mail 2, phone 1", None], "masked": [None, "[e-mail] and [e-mail], [phone]", None],
    }  # fmt: skip


@given(st.lists(st.sampled_from([*(text for _, text in CASES), " ", ", ", "\n", "1", "+", "@", ".", ":", "-", "x"])))
def test_a_masked_text_holds_nothing_more_to_mask_and_spans_do_not_overlap(pieces: list[str]) -> None:
    text = "".join(pieces)
    found = [*spans(text)]
    assert all(0 <= start < stop <= len(text) for start, stop, _ in found)
    assert all(one[1] <= other[0] for one, other in pairwise(found))
    assert {kind for *_, kind in found} <= set(KINDS)


PIECES = [*(text for _, text in CASES), " ", "\u00a0", "\u2011", "/", "(", "0049", "+49", "1"]


@given(st.lists(st.sampled_from(PIECES)))
def test_a_scan_finds_what_is_found_without_its_hints(pieces: list[str]) -> None:
    text = "".join(pieces)
    whole, what = masked(text)
    assert scan(pa.array([text])).to_pylist() == [{"personal": what or None, "masked": whole if what else None}]


@pytest.mark.parametrize("number", ["79927398713", "4111111111111111", "378282246310005"])
def test_one_wrong_digit_breaks_luhns_sum(number: str) -> None:
    assert luhn(number)
    for at, digit in enumerate(number):
        assert not any(luhn(number[:at] + other + number[at + 1 :]) for other in "0123456789" if other != digit)


@given(st.text("aé1.-+_@ ,", max_size=150) | st.text("ab.@c", min_size=300, max_size=700))
def test_addresses_are_found_by_their_sign_as_by_trying_each_word(text: str) -> None:
    assert [found.span() for found in _emails(text)] == [found.span() for found in _EMAIL.finditer(text)]


@pytest.mark.parametrize(
    "unit",
    ["a", "1", "1 ", "@", "a@", "a.", "1:", "a@b.c ", "1.1.1.1 ", "a@b.co ", "+1 22 ", "\u0301",
     "4111 1111 1111 1111 ", "4111 1111 1111 1111\n", "4111 1111 1111 1111 123 ", "(1) ", "a-", "_", "a@b.co_",
     "+49/3/", "+33 1 ", "0049 (0)", "+1 415 555 0123 ", "2001:db8::1: ", "a@b.co:c/"],
)  # fmt: skip
def test_a_text_of_a_megabyte_takes_seconds_at_most(unit: str) -> None:
    started = time.process_time()
    scan(pa.array([unit * (10**6 // len(unit))]))
    assert time.process_time() - started < 6  # 0.5 s on an idle core; a square would take hours
