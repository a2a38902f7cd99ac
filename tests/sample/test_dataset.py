import gzip
import hashlib
import os
import re
import subprocess
import sys
import uuid
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import orjson
import pytest

from tasks.sample.dataset import SAMPLE_NAME, planted, sample_bytes, sample_trees
from tasks.sample.facts import FAMILIES, Fact, facts, held_out_questions, is_right, normalise, trained_questions

TREE_KEYS = ["message_tree_id", "tree_state", "prompt", "origin"]
NODE_KEYS = [
    "message_id", "parent_id", "user_id", "created_date", "text", "role", "lang", "review_count", "review_result",
    "deleted", "rank", "synthetic", "model_name", "emojis", "replies", "labels", "events", "detoxify",
    "message_tree_id", "tree_state",
]  # fmt: skip
DETOXIFY = ["toxicity", "severe_toxicity", "obscene", "identity_attack", "insult", "threat", "sexual_explicit"]

Node = dict[str, Any]
Link = tuple[Node, Node | None]  # a message and the one above it


def walk(node: Node, parent: Node | None = None) -> Iterator[Link]:
    yield node, parent
    for reply in node["replies"]:
        yield from walk(reply, node)


def words(node: Node) -> list[str]:
    return [message["text"] for message, _ in walk(node)]


def label(node: Node, name: str) -> float:
    return float((node["labels"] or {}).get(name, {"value": 0.0})["value"])


@pytest.fixture(scope="module")
def trees() -> list[Node]:
    return [orjson.loads(line) for line in gzip.decompress(sample_bytes()).splitlines()]


@pytest.fixture(scope="module")
def messages(trees: list[Node]) -> list[Link]:
    return [pair for tree in trees for pair in walk(tree["prompt"])]


def test_the_same_bytes_come_from_every_process_whatever_its_hash_seed() -> None:
    code = "import hashlib; from tasks.sample.dataset import *; print(hashlib.sha256(sample_bytes()).hexdigest())"
    env = {**os.environ, "PYTHONHASHSEED": "12345", "TZ": "Asia/Tokyo"}
    other = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert other.strip() == hashlib.sha256(sample_bytes()).hexdigest()
    assert sample_bytes() == sample_bytes()


def test_the_file_is_one_gzip_member_of_stored_blocks_without_a_time() -> None:
    data = sample_bytes()
    assert SAMPLE_NAME.endswith(".trees.jsonl.gz")
    assert data[:10] == b"\x1f\x8b\x08" + bytes(6) + b"\xff"
    reader = zlib.decompressobj(wbits=31)  # checks CRC32 and ISIZE
    plain = reader.decompress(data)
    assert (reader.eof, reader.unused_data) == (True, b"")
    blocks = -(-len(plain) // 65_535)
    assert len(data) == len(plain) + 5 * blocks + 18
    assert plain.endswith(b"\n")
    assert len(plain) < 12_000_000


def test_the_file_holds_what_sample_trees_yields(trees: list[Node]) -> None:
    assert trees == list(sample_trees())
    assert 3_500 <= len(trees) <= 5_000


def test_every_tree_and_node_has_the_published_keys_in_their_order(trees: list[Node], messages: list[Link]) -> None:
    assert all(list(tree) == TREE_KEYS for tree in trees)
    assert all(list(node) == NODE_KEYS for node, _ in messages)
    assert all(list(node["detoxify"]) == DETOXIFY for node, _ in messages)
    assert all({"value", "count"} == set(mark) for node, _ in messages for mark in (node["labels"] or {}).values())


def test_ids_are_uuids_that_occur_once(messages: list[Link]) -> None:
    ids = [node["message_id"] for node, _ in messages]
    assert len(set(ids)) == len(ids)
    assert all(str(uuid.UUID(name)) == name for name in ids)


def test_every_message_links_to_the_one_above(trees: list[Node], messages: list[Link]) -> None:
    assert all(node["parent_id"] == (parent and parent["message_id"]) for node, parent in messages)
    assert all(tree["message_tree_id"] == tree["prompt"]["message_id"] for tree in trees)


def test_a_reply_is_written_after_what_it_answers(messages: list[Link]) -> None:
    assert all(node["created_date"] > parent["created_date"] for node, parent in messages if parent)
    assert all(
        re.fullmatch(r"2023-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00", node["created_date"]) for node, _ in messages
    )


def test_ranks_count_from_zero_without_a_gap(messages: list[Link]) -> None:
    for node, _ in messages:
        ranks = [reply["rank"] for reply in node["replies"] if reply["rank"] is not None]
        assert ranks == list(range(len(ranks)))


def test_every_trained_question_opens_a_tree_and_no_held_out_question_is_asked_anywhere(
    trees: list[Node], messages: list[Link]
) -> None:
    opened = Counter(tree["prompt"]["text"] for tree in trees)
    assert all(opened[q.text] >= 1 for q in trained_questions())
    said = {normalise(node["text"]) for node, _ in messages}
    assert not said & {normalise(q.text) for q in held_out_questions()}


def test_the_numbers_of_planted_are_true(trees: list[Node], messages: list[Link]) -> None:
    ready = [tree["prompt"] for tree in trees if tree["tree_state"] == "ready_for_export"]
    nodes = [node for node, _ in messages]
    untouched = [n for n in nodes if n["review_result"] and not n["deleted"] and not n["synthetic"]]
    dialogues = Counter(tuple(words(root)) for root in ready)
    sentence = re.compile(r"The (capital|chemical symbol|opposite|plural) (of|for) .+ is .+\.|A baby .+ is called .+\.")
    counts = {
        "trees": len(trees),
        "messages": len(nodes),
        "not_ready": len(trees) - len(ready),
        "other_language": sum(root["lang"] != "en" for root in ready),
        "unicode": sum(root["lang"] == "en" and max("".join(words(root))) > "\u02ff" for root in ready),
        "endoftext": sum("<|endoftext|>" in "".join(words(root)) for root in ready),
        "duplicate": sum(count - 1 for count in dialogues.values()),
        "near_duplicate": near_duplicates(ready),
        "deleted": sum(n["deleted"] for n in nodes),
        "rejected": sum(n["review_result"] is False for n in nodes),
        "undecided": sum(n["review_result"] is None for n in nodes),
        "synthetic": sum(n["synthetic"] and n["model_name"] is not None for n in nodes),
        "unranked": sum(n["role"] == "assistant" and n["rank"] is None and n["text"] != HOPE for n in untouched),
        "role_break": sum(parent is not None and parent["role"] == node["role"] for node, parent in messages),
        "empty": sum(n["text"] == "" for n in nodes),
        "blank": sum(n["text"] != "" and not n["text"].strip() for n in nodes),
        "ai_paste": sum("As an AI language model" in n["text"] for n in nodes),
        "unlabelled": sum(n["labels"] is None for n in nodes),
        "other_language_reply": sum(
            p is not None and n["lang"] != p["lang"] and label(n, "lang_mismatch") > 0.5 for n, p in messages
        ),
        "spam_label": sum(label(n, "spam") > 0.5 for n in nodes),
        "low_quality": sum(n["labels"] is not None and label(n, "quality") < 0.4 for n in nodes),
        "pii": sum(label(n, "pii") >= 0.5 for n in nodes),
        "not_appropriate": sum(label(n, "not_appropriate") >= 0.5 for n in nodes),
        "hate_speech": sum(label(n, "hate_speech") >= 0.5 for n in nodes),
        "toxic": sum(n["detoxify"]["toxicity"] > 0.9 and label(n, "toxicity") > 0.5 for n in nodes),
        "unanswered": sum(
            n["role"] == "prompter" and not n["replies"] for root in ready for n, _ in walk(root) if kept(n)
        ),
        "sentence": sum(n["rank"] == 1 and bool(sentence.fullmatch(n["text"])) for n in untouched),
        "next_question": sum(bool(p) and n["role"] == "prompter" and n["text"] != "Thanks!" for n, p in messages),
        "wrong": len(list(wrong_answers(trees))),
    }
    assert counts == planted()


HOPE = "I hope this helps."  # the reply to a reply that a role break is


def near_duplicates(ready: list[Node]) -> int:
    """Count long replies that share 80 % of their five-word shingles, but not all, with an original."""

    def shingles(root: Node) -> set[tuple[str, ...]]:
        said = root["replies"][0]["text"].split()
        return {tuple(said[at : at + 5]) for at in range(len(said) - 4)}

    essays = [root for root in ready if root["replies"] and len(root["replies"][0]["text"].split()) > 50]
    firsts = [shingles(root) for root in essays if root["text"].startswith("Write ")]
    others = [shingles(root) for root in essays if not root["text"].startswith("Write ")]
    return sum(any(0.8 <= len(a & b) / len(a | b) < 1 for a in firsts) for b in others)


def kept(node: Node) -> bool:
    """Tell whether a message survives the usual filters, looking at it alone."""
    flags = ("spam", "lang_mismatch", "pii", "not_appropriate", "hate_speech")
    return (
        node["review_result"] is not False
        and not (node["deleted"] or node["synthetic"] or node["detoxify"]["toxicity"] > 0.9)
        and not any(label(node, flag) >= 0.5 for flag in flags)
        and (node["labels"] is None or label(node, "quality") >= 0.4)
        and bool(node["text"].strip())
        and "As an AI language model" not in node["text"]
    )


FACTS_OF = {q.text: q.fact for q in trained_questions()}
SUBJECTS = {(fact.family, fact.subject): fact for fact in facts()}


def asked(trees: list[Node]) -> Iterator[tuple[Fact, Node]]:
    """Yield the fact and the first message of every tree that opens with a question."""
    for tree in trees:
        fact = FACTS_OF.get(tree["prompt"]["text"].removeprefix("Quick question: "))
        if fact:
            yield fact, tree["prompt"]


def wrong_answers(trees: list[Node]) -> Iterator[Node]:
    """Yield the answers, right in form, that are wrong for the question above them."""
    answers = {normalise(fact.answer) for fact in facts()}
    for fact, root in asked(trees):
        for reply in root["replies"]:
            if normalise(reply["text"]) in answers and not is_right(fact, reply["text"]):
                yield reply


def test_a_wrong_answer_stands_only_in_a_deleted_or_rejected_message(trees: list[Node]) -> None:
    assert all(node["deleted"] or node["review_result"] is False for node in wrong_answers(trees))


def test_every_reply_to_a_question_that_survives_the_filters_is_right(trees: list[Node]) -> None:
    replies = [(fact, reply["text"]) for fact, root in asked(trees) for reply in root["replies"] if kept(reply)]
    assert len(replies) > len(trained_questions())
    assert [(fact, text) for fact, text in replies if not is_right(fact, text)] == []


def test_every_next_question_is_answered_rightly(trees: list[Node]) -> None:
    answered = 0
    for fact, root in asked(trees):
        for node, parent in walk(root):
            if parent and parent["parent_id"] and parent["role"] == "prompter" and parent["text"] != "Thanks!":
                assert is_right(asked_next(fact.family, parent["text"]), node["text"])
                answered += 1
    assert answered == planted()["next_question"]


def asked_next(family: str, text: str) -> Fact:
    for form in FAMILIES[family].follow_ups:
        before, after = form.split("{s}")
        subject = text.removeprefix(before).removesuffix(after)
        if text == before + subject + after and (family, subject) in SUBJECTS:
            return SUBJECTS[family, subject]
    raise AssertionError(text)


def test_impurities_lie_spread_over_the_file(trees: list[Node]) -> None:
    half = len(trees) // 2
    for part in (trees[:half], trees[half:]):
        deleted = sum(node["deleted"] for tree in part for node, _ in walk(tree["prompt"]))
        assert 0.3 < deleted / planted()["deleted"] < 0.7
