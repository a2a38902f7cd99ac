"""Laws of what is shown of an artifact's rows."""

from typing import Any

from flows.showing import aside_line, verdict

KEPT: dict[str, Any] = {
    "message_id": "m",
    "message_tree_id": "t",
    "role": "prompter",
    "text": "Write to [e-mail]",
    "split": "val",
}


def test_a_kept_message_says_where_it_is_and_what_was_masked_in_it() -> None:
    assert verdict(KEPT) == "prompter m: kept in val, tree t\n    Write to [e-mail]"
    assert verdict(KEPT | {"masked": "e-mail 1"}).splitlines()[0] == "prompter m: kept in val, tree t, masked: e-mail 1"


def test_what_was_set_aside_says_why_in_two_lines() -> None:
    bad = {"file": "a.jsonl", "line": 1_234, "code": "json.syntax", "message": "expected }", "head": '{"a'}
    assert aside_line(bad) == 'a.jsonl line 1,234: json.syntax: expected }\n    {"a'
    dropped = {"message_id": "m", "role": "assistant", "reason": "personal", "evidence": "phone 1", "text": "x\n" * 99}
    first, second = aside_line(dropped).splitlines()
    assert first == "assistant m: dropped by personal: phone 1"
    assert len(second) <= 104
