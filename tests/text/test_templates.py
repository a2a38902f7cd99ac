from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.artifacts import Encoding, write_encoding
from tasks.chats.rows import tree_of
from tasks.errors import ParameterError
from tasks.oasst.validators import Fault
from tasks.text.assemble import Texts, lay, turns
from tasks.text.bpe import trained
from tasks.text.templates import ASSISTANT, END, EOT, PAD, SPECIALS, TEMPLATES, USER, XML, Dialect, Tags, load_dialect

TURNS = [("user", "Hi there?\n"), ("assistant", '"Hello!"\n\n'), ("user", " `x` …"), ("assistant", "ok")]
texts = st.text() | st.lists(st.sampled_from([*SPECIALS, *XML.plain(), "\n", " ", "?", "a"])).map("".join)
talks = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), texts), min_size=1, max_size=5)
each_template = pytest.mark.parametrize("name", TEMPLATES)


@cache
def dialect(name: str) -> Dialect:
    words = trained(["How do you do, <user>?", "Well </assistant>"] * 2, 320, TEMPLATES[name].plain())
    return Dialect(words.exported(), TEMPLATES[name], words.specials, words.size_padded, block=64)


class Document(NamedTuple):
    ids: list[int]
    mask: list[int]


def laid(tags: Tags, said: list[tuple[str, list[int]]]) -> Document:
    """Lay one conversation as the encode step does, without padding."""
    ids = np.array([token for _, text in said for token in text], np.uint16)
    lengths = np.array([len(text) for _, text in said])
    replies = np.array([role == "assistant" for role, _ in said])
    placed = turns([tuple(range(len(said)))], [0], [[0]], np.arange(-1, len(said) - 1), replies, lengths, tags)
    size = int(placed.size.sum())
    texts = Texts(len(said), [ids], np.cumsum(lengths) - lengths, lengths)
    made = lay(placed, texts, tags, 0, 1, size, 0)
    assert made.mask.sum() == placed.trained.sum()
    return Document(made.ids.tolist(), made.mask.tolist())


def written(name: str, said: list[tuple[str, str]]) -> Document:
    return laid(dialect(name).tags, [(role, dialect(name).encode(text)) for role, text in said])


def spelled(name: str, ids: list[int]) -> str:
    text: str = dialect(name)._tokenizer.decode(ids, skip_special_tokens=False)
    return text


def test_chat_stands_role_tokens_around_the_turns() -> None:
    assert spelled("chat", written("chat", [("user", "Hi"), ("assistant", "Yo")]).ids) == (
        f"{EOT}{USER}Hi{END}{ASSISTANT}Yo{END}"
    )


def test_xml_is_the_text_of_the_seed_but_for_the_ends_of_text() -> None:
    text = spelled("xml", written("xml", [("user", "PROMPT"), ("assistant", "REPLY")]).ids)
    assert text.replace(EOT, "") == (
        "<conversation>\n<user>PROMPT</user>\n<assistant>REPLY</assistant>\n</conversation>"
    )
    assert text.count(EOT) == 2


@each_template
@given(turns=talks)
@settings(max_examples=100, deadline=None)
def test_a_prompt_is_an_exact_prefix_of_the_whole(name: str, turns: list[tuple[str, str]]) -> None:
    whole = written(name, [*turns, ("assistant", "and a reply")]).ids
    prompt = dialect(name).prompt(turns)
    assert whole[: len(prompt)] == prompt


@each_template
@given(turns=talks)
@settings(max_examples=100, deadline=None)
def test_the_mask_marks_replies_and_their_ends_and_nothing_else(name: str, turns: list[tuple[str, str]]) -> None:
    made = written(name, turns)
    closing = "".join(TEMPLATES[name].closes["assistant"])
    marked = spelled(name, [token for token, target in zip(made.ids, made.mask, strict=True) if target])
    assert marked == "".join(text + closing for role, text in turns if role == "assistant")


@each_template
@given(turns=talks)
@settings(max_examples=100, deadline=None)
def test_no_text_makes_a_special_id(name: str, turns: list[tuple[str, str]]) -> None:
    special = set(dialect(name).specials.values())
    empty = dialect(name).prompt([(role, "") for role, _ in turns])
    found = dialect(name).prompt(turns)
    assert [token for token in found if token in special] == [token for token in empty if token in special]


@each_template
@given(text=texts)
@settings(max_examples=100, deadline=None)
def test_a_reply_reads_as_it_was_written(name: str, text: str) -> None:
    made, alone = written(name, [("user", "a"), ("assistant", text)]), dialect(name)
    reply = [token for token, target in zip(made.ids, made.mask, strict=True) if target]
    assert reply[-1] == alone.stop
    assert alone.decode(reply) == text
    assert alone.decode(alone.encode(text)) == text.removesuffix("</assistant>" if name == "xml" else "\0")


def test_ids_that_stand_for_nothing_decode_to_nothing() -> None:
    assert dialect("chat").decode([*dialect("chat").encode("so"), dialect("chat").vocab_size - 1]) == "so"


def test_half_a_surrogate_pair_is_asked_as_a_replacement_character() -> None:
    assert dialect("chat").encode("a\ud83d") == dialect("chat").encode("a\ufffd")


def test_an_unknown_role_is_refused() -> None:
    with pytest.raises(ParameterError, match="'system'"):
        dialect("chat").prompt([("system", "Be kind.")])


@each_template
def test_a_dialect_is_loaded_from_a_folder_without_tiktoken(tmp_path: Path, name: str) -> None:
    here = dialect(name)
    words = trained(["a b"], 300, TEMPLATES[name].plain())
    words.exported().save(str(tmp_path / "tokenizer.json"))
    encoding = Encoding(64, 64, words.size_padded, name, "paths", words.specials, 0, words.specials[EOT], {}, {})
    write_encoding(tmp_path, encoding)
    loaded = load_dialect(tmp_path)
    assert (loaded.block, loaded.vocab_size, loaded.template) == (64, words.size_padded, here.template)
    assert asdict(encoding)["specials"] == loaded.specials
    assert loaded.prompt([("user", EOT)]).count(loaded.specials[EOT]) == 1


def opened(folder: Path, name: str) -> tuple[Any, Dialect]:
    """Return a tokenizer as transformers opens it, and the dialect of the same vocabulary."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    plain = trained(["How do you do?"], 320, TEMPLATES[name].plain()).exported()
    plain.save(str(folder / "tokenizer.json"))
    made = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token=EOT, pad_token=PAD)
    made.chat_template = TEMPLATES[name].jinja()
    made.save_pretrained(folder)
    loaded = AutoTokenizer.from_pretrained(folder)
    specials = {text: loaded.convert_tokens_to_ids(text) for text in SPECIALS}
    return loaded, Dialect(plain, TEMPLATES[name], specials, 384, 64)


def row(turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


def test_a_model_of_before_there_was_a_pad_keeps_what_it_was_padded_with() -> None:
    now = dialect("chat")
    before = {text: token for text, token in now.specials.items() if text != PAD}
    old = Dialect(now._tokenizer, now.template, before, now.vocab_size, now.block)
    assert (old.pad, now.pad) == (before[EOT], now.specials[PAD])


@each_template
def test_transformers_gives_the_ids_and_the_loss_mask_of_training(tmp_path: Path, name: str) -> None:
    loaded, ours = opened(tmp_path, name)
    odd = ["", " ", "\n\n", "🙂", "漢 字🙂 ", "a\u0301 …", "  x  ", "{{ 1 }} {% if %}", "\u00ff"]
    for said in (TURNS, *([("user", text), ("assistant", text)] * 2 for text in odd)):
        made = laid(ours.tags, [(role, ours.encode(text)) for role, text in said])
        found = loaded.apply_chat_template(row(said), return_dict=True, return_assistant_tokens_mask=True)
        assert (found["input_ids"], found["assistant_masks"]) == (made.ids, made.mask)
    for count in (1, 3):
        asked = loaded.apply_chat_template(row(TURNS[:count]), add_generation_prompt=True, return_dict=False)
        assert asked == ours.prompt(TURNS[:count])


@each_template
@pytest.mark.parametrize("system", ["Be kind.", ""])
def test_a_system_message_is_put_before_the_users_as_in_the_rows_that_are_trained_on(
    tmp_path: Path, name: str, system: str
) -> None:
    loaded, ours = opened(tmp_path, name)
    messages = row([("system", system), *TURNS])
    folded = tree_of({"messages": messages})["prompt"]["text"]
    said = [("user", folded), *TURNS[1:]]
    expected = laid(ours.tags, [(role, ours.encode(text)) for role, text in said])
    found = loaded.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert (found["input_ids"], found["assistant_masks"]) == (expected.ids, expected.mask)


@pytest.mark.parametrize("roles", ["system", "system assistant", "user system", "system system user", "tool"])
def test_what_is_not_trained_on_is_refused_by_the_template_as_by_the_reader_of_rows(tmp_path: Path, roles: str) -> None:
    loaded, _ = opened(tmp_path, "chat")
    messages = row([(role, "x") for role in roles.split()])
    with pytest.raises(Fault):
        tree_of({"messages": messages})
    with pytest.raises(jinja2.TemplateError, match="system"):
        loaded.apply_chat_template(messages)
