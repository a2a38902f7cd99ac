import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import GPT2LMHeadModel

from tasks.gpt.attention import by_ends, set_way, visible
from tasks.gpt.weights import build_start, scratch_spec


def tiny(vocab_size: int = 32, positions: int = 16) -> GPT2LMHeadModel:
    spec = scratch_spec(layers=2, heads=2, width=16, positions=positions, vocab_size=vocab_size, seed=0)
    return build_start(spec).eval()


def test_a_token_sees_what_came_before_it_and_has_not_ended() -> None:
    # two documents of 3 and 2 tokens, and a padding token
    seen = visible(torch.tensor([[3, 3, 3, 5, 5, 6]]))[0, 0].int()
    assert seen.tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_siblings_see_their_ancestors_and_not_each_other() -> None:
    # a question of 2 tokens, and two replies of 1 and 2 tokens to it
    seen = visible(torch.tensor([[5, 5, 3, 5, 5]]))[0, 0].int()
    assert seen[2].tolist() == [1, 1, 1, 0, 0]
    assert seen[4].tolist() == [1, 1, 0, 1, 1]


def test_packed_documents_give_the_logits_that_each_gives_alone() -> None:
    model, ids = tiny(), torch.randint(0, 32, (1, 12), generator=torch.Generator().manual_seed(1))
    cuts = [(0, 5), (5, 8), (8, 12)]
    ends = torch.tensor([[5] * 5 + [8] * 3 + [12] * 4])
    positions = torch.tensor([[*range(5), *range(3), *range(4)]])
    packed = model(ids, attention_mask=visible(ends), position_ids=positions).logits
    for first, last in cuts:
        torch.testing.assert_close(packed[:, first:last], model(ids[:, first:last]).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [256, 257, 767, 768])
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "packed"])
def test_whichever_way_is_the_fastest_sees_what_the_mask_lets_it(length: int, plain: bool) -> None:
    draw, model = torch.Generator().manual_seed(0), tiny(positions=length)
    ends = torch.full((2, length), length)
    if not plain:
        ends[1, :90] = 90
    q, k, v = (torch.randn(2, 2, length, 8, generator=draw) for _ in range(3))
    scale = model.transformer.h[0].attn.scaling
    expected = scaled_dot_product_attention(q, k, v, attn_mask=visible(ends), scale=scale)
    for way in ("parts", "sdpa"):
        set_way(model, way)
        torch.testing.assert_close(by_ends(model, ends)(0, q, k, v), expected, rtol=1e-5, atol=1e-6)


def test_padding_gives_no_nan_whatever_its_ends_say() -> None:
    ends = torch.tensor([[2, 2, 0, 0], [1, 2, 3, 4]])
    logits = tiny()(torch.zeros(2, 4, dtype=torch.long), attention_mask=visible(ends)).logits
    assert logits.isfinite().all()
