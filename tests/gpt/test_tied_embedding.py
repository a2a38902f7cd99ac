"""A tied table gets the gradient of both of its ends."""

import torch
from torch.nn.functional import embedding
from transformers import GPT2Config, GPT2LMHeadModel

from tasks.gpt.tied_embedding import ends_of

IDS = torch.tensor([[3, 1, 3], [0, 3, 4]])


def model(tied: bool = True) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=6, n_embd=4, n_layer=1, n_head=1, tie_word_embeddings=tied))


def test_the_gradient_of_a_tied_table_is_that_of_both_ends() -> None:
    weight = model().lm_head.weight
    given = model()
    rows, table = ends_of(given, IDS)
    assert rows is not None
    assert torch.equal(rows, embedding(IDS, weight))
    ((rows * rows) @ table.T).square().sum().backward()  # type: ignore[no-untyped-call]
    looked_up = embedding(IDS, weight)
    ((looked_up * looked_up) @ weight.T).square().sum().backward()
    torch.testing.assert_close(given.lm_head.weight.grad, weight.grad, rtol=1e-5, atol=1e-6)


def test_an_untied_head_is_left_to_itself() -> None:
    given = model(tied=False)
    rows, table = ends_of(given, IDS)
    assert rows is None
    assert table is given.lm_head.weight
