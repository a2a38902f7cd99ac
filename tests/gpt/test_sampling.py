"""Laws of sampling: the cache, the batch and the padding change nothing of what a model says."""

import time
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tasks.errors import ParameterError
from tasks.gpt.kv_cache import STRETCH, Cache
from tasks.gpt.loops import looping
from tasks.gpt.sampling import Reply, generate, stream

VOCAB, POSITIONS, STOP = 61, 32, 32  # this id ends some replies of `model`, not all


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from a second thread, and lose much where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def model(seed: int = 0, scale: float = 4.0, positions: int = POSITIONS) -> Any:
    """Return a small GPT-2 whose logits lie far enough apart that float noise decides no token."""
    torch.manual_seed(seed)
    shape = GPT2Config(
        vocab_size=64, n_positions=positions, n_embd=32, n_layer=3, n_head=4, bos_token_id=None, eos_token_id=None
    )
    made = GPT2LMHeadModel(shape).eval()
    with torch.no_grad():
        for weights in made.parameters():
            if weights.ndim == 2:
                weights.mul_(scale)
    return made


def prompts(count: int, seed: int = 1) -> list[tuple[int, ...]]:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (count,), generator=draw).tolist()
    return [tuple(torch.randint(0, VOCAB, (length,), generator=draw).tolist()) for length in lengths]


@cache
def slow_greedy(prompt: tuple[int, ...], max_new: int) -> Reply:
    """Reply by the plainest means: no cache, no batch, no padding, the whole text read again for each token."""
    ids: list[int] = []
    while len(ids) < max_new and len(prompt) + len(ids) < POSITIONS:
        with torch.inference_mode():
            logits = model()(torch.tensor([[*prompt, *ids]])).logits[0, -1, :VOCAB]
        token = int(logits.argmax())
        if token == STOP:
            return Reply(tuple(ids), "stopped")
        ids.append(token)
    return Reply(tuple(ids), "cut")


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_greedy_replies_equal_those_without_cache_batch_or_padding(batch: int) -> None:
    asked = prompts(24)
    expected = [slow_greedy(prompt, 20) for prompt in asked]
    assert generate(model(), asked, STOP, 20, vocab=VOCAB, batch=batch) == expected
    assert {reply.stopped for reply in expected} == {True, False}  # both ends are tested
    assert len({reply.ids for reply in expected}) > 12


def test_a_stream_yields_the_tokens_of_the_reply() -> None:
    for prompt in prompts(10):
        assert tuple(stream(model(), prompt, STOP, 20, vocab=VOCAB)) == slow_greedy(prompt, 20).ids
    drawn = generate(model(), [[3, 4]], STOP, 12, temperature=1.0, seeds=[5])[0]
    assert tuple(stream(model(), [3, 4], STOP, 12, temperature=1.0, seed=5)) == drawn.ids


def test_a_reply_ends_where_the_positions_end() -> None:
    said = generate(model(), [[1] * (POSITIONS - 1), [1] * 3], STOP, 1_000, vocab=VOCAB)
    assert len(said[0].ids) == 1
    assert len(said[1].ids) <= POSITIONS - 3


def test_without_a_limit_a_reply_has_the_room_of_the_model_and_ends_when_it_loops() -> None:
    """Each token is the likeliest after all before it, read as a whole; so also where the cache had to grow."""
    made, asked = model(positions=300), prompts(40)
    stop = generate(made, asked[:1], -1, 12)[0].ids[-1]
    said = generate(made, asked, stop, vocab=VOCAB)
    for prompt, reply in zip(asked, said, strict=True):
        with torch.inference_mode():
            best = made(torch.tensor([[*prompt, *reply.ids]])).logits[0, len(prompt) - 1 :, :VOCAB].argmax(-1).tolist()
        assert reply.ids == tuple(best[: len(reply.ids)])
        assert (best[-1] == stop) == (reply.end == "stopped")
        assert looping(reply.ids) == (reply.end == "looping")
        assert not looping(reply.ids[:-1])
        assert reply.end != "cut" or len(prompt) + len(reply.ids) == 300
    assert {reply.end for reply in said} == {"stopped", "looping", "cut"}
    assert max(len(reply.ids) for reply in said) > 2 * STRETCH
    assert tuple(stream(made, asked[0], stop, 300, vocab=VOCAB)) == said[0].ids


def test_the_cache_takes_no_room_that_nobody_may_need() -> None:
    cache = Cache(model(), torch.ones(2, 5, dtype=torch.bool), 10_000)
    assert {stored.shape[3] for stored in cache.keys_values} == {5 + STRETCH}


def test_what_is_drawn_depends_on_the_seed_alone() -> None:
    asked = prompts(16)
    settings: dict[str, Any] = {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "vocab": VOCAB}
    together = generate(model(scale=2.0), asked, STOP, 15, seeds=range(16), batch=16, **settings)
    assert together == generate(model(scale=2.0), asked, STOP, 15, seeds=range(16), batch=3, **settings)
    backwards = generate(model(scale=2.0), asked[::-1], STOP, 15, seeds=range(15, -1, -1), **settings)
    assert together == backwards[::-1]
    assert together != generate(model(scale=2.0), asked, STOP, 15, seeds=range(100, 116), **settings)


def test_tokens_are_drawn_as_often_as_the_model_finds_them_likely() -> None:
    with torch.inference_mode():
        expected = (model(scale=1.0)(torch.tensor([[5, 9]])).logits[0, -1] / 0.5).softmax(-1)
    drawn = generate(model(scale=1.0), [[5, 9]] * 8_000, -1, 1, temperature=0.5, seeds=range(8_000), batch=8_000)
    counted = torch.bincount(torch.tensor([reply.ids[0] for reply in drawn]), minlength=64) / 8_000
    assert (counted - expected).abs().sum() < 0.1  # expected about 0.07 for 64 tokens and 8,000 draws


def test_top_p_keeps_the_fewest_tokens_that_hold_the_probability() -> None:
    with torch.inference_mode():
        p, ids = model(scale=2.0)(torch.tensor([[5, 9]])).logits[0, -1].softmax(-1).sort(descending=True)
    kept = int((p.cumsum(0) < 0.5).sum()) + 1
    said = generate(model(scale=2.0), [[5, 9]] * 500, -1, 1, temperature=1.0, top_p=0.5, seeds=range(500))
    assert {reply.ids[0] for reply in said} <= set(ids[:kept].tolist())
    assert len({reply.ids[0] for reply in said}) > 1


@pytest.mark.parametrize("cut", [{"top_k": 1}, {"top_p": 1e-9}])
def test_a_cut_to_one_token_is_greedy(cut: dict[str, Any]) -> None:
    asked = prompts(10)
    greedy = generate(model(), asked, STOP, 8)
    assert generate(model(), asked, STOP, 8, temperature=2.0, seeds=range(10), **cut) == greedy


def test_ids_beyond_the_vocabulary_are_never_drawn() -> None:
    said = generate(model(), [[1]] * 50, STOP, 20, temperature=50.0, seeds=range(50), vocab=10)
    assert max(max(reply.ids, default=0) for reply in said) < 10


@pytest.mark.parametrize(
    "bad",
    [
        {"prompts": [[]]},
        {"prompts": [[1] * POSITIONS]},
        {"max_new": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": 1.0},  # no seeds
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
    ],
)
def test_what_cannot_be_sampled_is_refused(bad: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"prompts": [[1]], "stop": STOP, "max_new": 3, **bad}
    with pytest.raises(ParameterError):
        generate(model(), **settings)


def test_a_model_with_dropout_on_is_refused() -> None:
    made = GPT2LMHeadModel(
        GPT2Config(vocab_size=8, n_positions=8, n_embd=4, n_layer=1, n_head=1, bos_token_id=None, eos_token_id=None)
    ).train()
    with pytest.raises(ValueError, match="eval"):
        generate(made, [[1]], 0, 1)


def test_nothing_asked_is_nothing_said() -> None:
    assert generate(model(), [], STOP, 5) == []


@pytest.mark.bench
def test_six_hundred_questions_take_under_five_seconds() -> None:
    torch.manual_seed(0)
    shape = GPT2Config(
        vocab_size=4_096, n_positions=128, n_embd=128, n_layer=3, n_head=4, bos_token_id=None, eos_token_id=None
    )
    made = GPT2LMHeadModel(shape).eval()
    asked = [[1 + row % 7] * (8 + row % 20) for row in range(640)]
    started = time.perf_counter()
    said = generate(made, asked, -1, 32, vocab=4_000, batch=128)
    assert sum(len(reply.ids) for reply in said) == 640 * 32
    assert time.perf_counter() - started < 5
