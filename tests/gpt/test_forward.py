"""The trunk gives what transformers gives, whatever a GPT-2's config asks of attention."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from tasks.gpt.attention import by_ends, visible
from tasks.gpt.forward import Trunk, hidden_states, recomputing
from tasks.gpt.weights import set_dropout

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


def gradients(given: GPT2LMHeadModel, trunk: Trunk, half: bool) -> dict[str, Tensor]:
    torch.manual_seed(5)
    given.zero_grad()
    ids = torch.randint(0, 64, (3, LENGTH))
    at = torch.arange(LENGTH).expand(3, -1)
    with torch.autocast("cpu", dtype=torch.bfloat16) if half else nullcontext():
        states = trunk(given, ids, at, by_ends(given, torch.full((3, LENGTH), LENGTH)))
        (states.square() * torch.linspace(0, 1, 32)).sum().backward()  # type: ignore[no-untyped-call]
    found = {name: weight.grad for name, weight in given.transformer.named_parameters() if weight.grad is not None}
    return {name: weight.to_dense() if weight.is_sparse else weight for name, weight in found.items()}


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.1])
def test_blocks_computed_again_give_the_same_gradients_to_the_bit(share: float, half: bool) -> None:
    given = model().train()
    set_dropout(given, share)
    plain, again = (gradients(given, trunk, half) for trunk in (hidden_states, recomputing))
    assert len(plain) == 3 * 12 + 4
    assert all(torch.equal(again[name], plain[name]) for name in plain)


def test_blocks_computed_again_keep_less() -> None:
    given = model().train()
    sizes: list[int] = []

    def note(kept: Tensor) -> Tensor:
        sizes[-1] += kept.numel()
        return kept

    for trunk in (hidden_states, recomputing):
        sizes.append(0)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept):
            gradients(given, trunk, half=False)
    assert sizes[1] < sizes[0] / 4
