"""The trunk gives what transformers gives, whatever a GPT-2's config asks of attention."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tasks.gpt.attention import by_ends, visible
from tasks.gpt.trunk import hidden_states

LENGTH = 16


def model(**odd: bool) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=64, n_positions=LENGTH, n_embd=32, n_layer=3, n_head=4, **odd)
    return GPT2LMHeadModel(shape).eval()


@pytest.mark.parametrize("documents", [1, 2, 4])
@pytest.mark.parametrize("odd", [{}, {"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}])
def test_logits_equal_those_of_transformers(odd: dict[str, bool], documents: int) -> None:
    given, size = model(**odd), LENGTH // documents
    ids = torch.randint(0, 64, (3, LENGTH))
    at = torch.arange(LENGTH)
    positions, ends = (at % size).expand(3, -1), (at // size * size + size).expand(3, -1)
    states = hidden_states(given, ids, positions, by_ends(given, ends))
    expected = given(input_ids=ids, position_ids=positions, attention_mask=visible(ends), use_cache=False).logits
    torch.testing.assert_close(given.lm_head(states), expected, rtol=1e-5, atol=1e-5)


def test_dropout_drops_in_training_only() -> None:
    given, ids = model(), torch.randint(0, 64, (1, LENGTH))
    at = torch.arange(LENGTH)[None]
    attend = by_ends(given, torch.full((1, LENGTH), LENGTH))
    once = hidden_states(given, ids, at, attend)
    assert torch.equal(once, hidden_states(given, ids, at, attend))
    given.train()
    assert not torch.allclose(once, hidden_states(given, ids, at, attend))
