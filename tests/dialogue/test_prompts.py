"""Laws of files of prompts: every usual form is read, and a line that holds none is named."""

import json

import pytest

from tasks.dialogue.prompts import read_prompts
from tasks.errors import InputError

ODD = [
    b"{", b"5", b'{"answer": "x"}', b'{"prompt": 5}', b'{"messages": [{"role": "user", "content": null}]}', b"\xff",
    b'""', b'{"prompt": "", "text": " "}', b'{"messages": [{"role": "system", "content": "S"}]}',
]  # fmt: skip


def test_a_text_file_holds_a_prompt_a_line() -> None:
    assert [*read_prompts("p.txt", "One?\n\n  \r\nZwölf?\r\n".encode())] == [(1, "One?"), (4, "Zwölf?\r")]


def test_json_lines_hold_texts_objects_or_chats() -> None:
    said = {"system": "S", "user": "A", "assistant": "B", "human": "C"}
    turns = [{"role": role, "content": text} for role, text in said.items()]
    lines = ["One?", {"question": "Two?", "answer": "2"}, {"prompt": "Three?"}, {"messages": turns}]
    content = "\n".join(json.dumps(line) for line in lines)
    assert [*read_prompts("P.JSONL", content.encode())] == [(1, "One?"), (2, "Two?"), (3, "Three?"), (4, "A"), (4, "C")]


@pytest.mark.parametrize("line", ODD)
def test_a_line_that_holds_no_prompt_is_named_with_what_was_expected(line: bytes) -> None:
    with pytest.raises(InputError, match=r"expected .*p\.jsonl line 2\. .*take it out") as error:
        [*read_prompts("p.jsonl", b'"ok"\n' + line)]
    assert error.value.code == "curate.prompts"


def test_a_row_asks_with_every_known_field_that_holds_text() -> None:
    rows = [{"instruction": "Sum it up.", "input": "A long text"}, {"prompt": " ", "question": "Why?"}]
    content = "\n".join(json.dumps(row) for row in rows).encode()
    assert [*read_prompts("p.jsonl", content)] == [(1, "Sum it up."), (1, "A long text"), (2, "Why?")]


@pytest.mark.parametrize("name", ["p.jsonl", "p.txt"])
@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf"])
def test_a_file_without_a_prompt_is_named_with_what_was_expected(name: str, content: bytes) -> None:
    with pytest.raises(InputError, match=r"expected .*a prompt a line|expected .*question") as error:
        [*read_prompts(name, content)]
    assert (error.value.where, error.value.code) == (name, "curate.prompts")
    assert "curate.prompt_files" in error.value.hint


@pytest.mark.parametrize(("name", "line"), [("p.jsonl", '{"text": "One?"}'), ("p.txt", "One?")])
def test_a_byte_order_mark_is_no_part_of_the_first_prompt(name: str, line: str) -> None:
    assert [*read_prompts(name, line.encode("utf-8-sig"))] == [(1, "One?")]


def test_a_text_that_is_no_utf8_is_named() -> None:
    with pytest.raises(InputError, match=r"expected UTF-8, found 'byte 0xff'. p\.txt line 1"):
        [*read_prompts("p.txt", b"\xff")]
