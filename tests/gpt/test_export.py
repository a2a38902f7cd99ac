"""Laws of a model that leaves: whoever opens its folder with transformers gets the replies that we get."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline
from transformers.utils import logging

from tasks.artifacts import Encoding, write_encoding
from tasks.gpt.sampling import generate
from tasks.gpt.weights import build_start, load_model, save_hf_folder, scratch_spec
from tasks.text.bpe import trained
from tasks.text.templates import EOT, PAD, TEMPLATES, Dialect, load_dialect
from tasks.tuning import write_tokenizer

POSITIONS, NEW = 128, 20
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW}
DRAW = random.Random(0)
SAID = ["".join(DRAW.choices("abcdefgh ?", k=DRAW.randint(1, 20))) for _ in range(50)]
CHATS = [[{"role": "user", "content": text}] for text in SAID]
each_template = pytest.mark.parametrize("template", TEMPLATES)


def exported(folder: Path, template: str, vocab_size: int = 320) -> Path:
    """Write a random model whose logits lie far enough apart that float noise decides no token."""
    (folder / "tokens").mkdir()
    (folder / "model").mkdir()
    chosen = TEMPLATES[template]
    words = trained(["How do you do, <user>?", "Well </assistant>"] * 2, vocab_size, chosen.plain())
    words.exported().save(str(folder / "tokens" / "tokenizer.json"))
    specials = words.specials
    ids = specials[chosen.stop], specials[PAD]
    encoding = Encoding(POSITIONS, POSITIONS, words.size_padded, template, "paths", specials, *ids, {}, {})
    write_encoding(folder / "tokens", encoding)
    shape = {"layers": 2, "heads": 2, "width": 32, "positions": POSITIONS, "vocab_size": encoding.vocab_size}
    model = build_start(scratch_spec(**shape, seed=0)).eval()
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim == 2:
                weights.mul_(5)
    save_hf_folder(model, folder / "model", stop=encoding.stop, pad=encoding.pad, used=encoding.used)
    write_tokenizer(folder / "model", folder / "tokens", encoding, POSITIONS)
    return folder / "model"


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.set_verbosity_error()  # that max_new_tokens goes before max_length is said at each call


def ours(folder: Path, dialect: Dialect, prompts: list[list[int]]) -> list[list[int]]:
    said = generate(load_model(folder), prompts, dialect.stop, NEW, vocab=dialect.used)
    return [[*reply.ids, *[dialect.stop] * reply.stopped] for reply in said]


def theirs(made: torch.Tensor, length: int, stop: int) -> list[int]:
    ids: list[int] = made[length:].tolist()
    return ids[: ids.index(stop) + 1] if stop in ids else ids


@each_template
def test_transformers_replies_as_we_do_with_and_without_a_mask_alone_and_in_a_batch(
    tmp_path: Path, template: str
) -> None:
    folder = exported(tmp_path, template)
    dialect, model, tokenizer = (
        load_dialect(folder),
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    prompts = [dialect.prompt([("user", text)]) for text in SAID]
    expected = ours(folder, dialect, prompts)
    assert len({tuple(reply) for reply in expected}) > 20
    for prompt, reply in zip(prompts, expected, strict=True):
        ids = torch.tensor([prompt])
        for mask in ({}, {"attention_mask": torch.ones_like(ids)}):
            assert theirs(model.generate(ids, **GREEDY, **mask)[0], len(prompt), dialect.stop) == reply
    batch = tokenizer.apply_chat_template(
        CHATS, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    length = batch["input_ids"].shape[1]
    for given in (batch, {"input_ids": batch["input_ids"]}):
        assert [theirs(made, length, dialect.stop) for made in model.generate(**given, **GREEDY)] == expected


@each_template
def test_a_pipeline_answers_chats_as_we_do_also_with_a_system_message(tmp_path: Path, template: str) -> None:
    folder = exported(tmp_path, template)
    dialect = load_dialect(folder)
    asked = pipeline("text-generation", model=str(folder))
    system = {"role": "system", "content": "Be kind."}
    for chats, texts in (
        (CHATS, SAID),
        ([[system, *chat] for chat in CHATS], [f"Be kind.\n\n{text}" for text in SAID]),
    ):
        said = ours(folder, dialect, [dialect.prompt([("user", text)]) for text in texts])
        expected = [asked.tokenizer.decode(ids, skip_special_tokens=True) for ids in said]
        for size in (1, 10):
            found = asked(chats, batch_size=size, return_full_text=False, **GREEDY)
            assert [one[0]["generated_text"] for one in found] == expected


@each_template
def test_the_pad_stands_in_no_conversation_and_is_a_special_token_of_the_tokenizer(
    tmp_path: Path, template: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported(tmp_path, template))
    chat = [*CHATS[0], {"role": "assistant", "content": "Yes."}, *CHATS[1]]
    ids = tokenizer.apply_chat_template(chat, return_dict=False)
    assert tokenizer.pad_token_id not in ids
    assert (tokenizer.pad_token, tokenizer.padding_side, tokenizer.decode(ids[:1])) == (PAD, "left", EOT)
    assert tokenizer.pad_token_id < load_dialect(tmp_path / "model").used


def test_a_vocabulary_that_fills_its_table_has_a_pad_too(tmp_path: Path) -> None:
    folder = exported(tmp_path, "chat", vocab_size=261)  # the bytes and the special tokens
    dialect = load_dialect(folder)
    assert dialect.pad == dialect.used - 1 == 260
    assert GenerationConfig.from_pretrained(folder).suppress_tokens == [*range(261, 320)]


def test_without_a_setting_replies_are_drawn_and_end_with_the_models_positions(tmp_path: Path) -> None:
    folder = exported(tmp_path, "chat")
    config, model = GenerationConfig.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert (config.do_sample, config.temperature, config.top_k, config.top_p) == (True, 0.7, 50, 0.95)
    assert model.generate(torch.tensor([[1, 2, 3]]), do_sample=False).shape[1] <= POSITIONS
