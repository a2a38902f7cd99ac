import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GPT2LMHeadModel

from tasks.gpt.batches import Batch
from tasks.gpt.loss import supervised_nats, token_nats
from tasks.gpt.weights import build_start, freeze, scratch_spec

VOCABULARY = 96


def tiny() -> GPT2LMHeadModel:
    spec = scratch_spec(layers=2, heads=2, width=16, positions=16, vocab_size=VOCABULARY, seed=0)
    return build_start(spec).eval()


def batch(rows: int = 3, length: int = 16) -> Batch:
    drawn = torch.Generator().manual_seed(2)
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=drawn)
    mask = torch.rand(rows, length, generator=drawn) < 0.6
    return Batch(ids, mask, torch.arange(length).expand(rows, -1), torch.full((rows, length), length))


def plain_nats(model: GPT2LMHeadModel, given: Batch) -> Tensor:
    """The whole logits at once, as transformers computes them."""
    wanted = given.ids.masked_fill(~given.mask, -100)[:, 1:]
    logits = model(given.ids).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum", ignore_index=-100)


def gradients(model: GPT2LMHeadModel, nats: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    nats.backward()  # type: ignore[no-untyped-call]
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_chunks_change_neither_loss_nor_gradients(chunk: int) -> None:
    model, given = tiny(), batch()
    ours, theirs = supervised_nats(model, *given, chunk=chunk), plain_nats(model, given)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    expected = gradients(model, theirs / 7)
    for name, found in gradients(model, ours / 7).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_a_weighed_token_counts_so_often_in_loss_and_gradients(chunk: int) -> None:
    model, given = tiny(), batch()
    weights = torch.rand(given.mask.shape, generator=torch.Generator().manual_seed(5)) + 0.1
    ours = supervised_nats(model, *given, weights=weights, chunk=chunk)
    wanted = given.ids.masked_fill(~given.mask, -100)[:, 1:]
    each = cross_entropy(model(given.ids).logits[:, :-1].transpose(1, 2), wanted, reduction="none", ignore_index=-100)
    theirs = (each * weights[:, 1:]).sum()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    expected = gradients(model, theirs / 7)
    for name, found in gradients(model, ours / 7).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-6)


def test_weights_of_1_change_no_bit() -> None:
    model, given = tiny(), batch()
    plain, weighed = supervised_nats(model, *given), supervised_nats(model, *given, weights=torch.ones(3, 16))
    assert torch.equal(plain, weighed)
    expected = gradients(model, plain)
    assert all(torch.equal(found, expected[name]) for name, found in gradients(model, weighed).items())


def test_token_losses_sum_to_the_loss_and_come_row_by_row() -> None:
    model, given = tiny(), batch()
    nats = token_nats(model, *given, chunk=5)
    assert nats.shape == (int(given.mask[:, 1:].sum()),)
    torch.testing.assert_close(nats.sum(), supervised_nats(model, *given).detach(), rtol=1e-6, atol=0)
    first = Batch(*(part[:1] for part in given))
    torch.testing.assert_close(nats[: int(first.mask[:, 1:].sum())], token_nats(model, *first))


def test_a_table_that_stays_as_it_is_gets_no_gradient_and_the_rest_the_same() -> None:
    model, given = tiny(), batch()
    expected = gradients(model, supervised_nats(model, *given) * 3)
    freeze(model, 1)
    found = gradients(model, supervised_nats(model, *given) * 3)
    assert not [name for name in found if name.startswith(("transformer.wte", "transformer.wpe", "transformer.h.0."))]
    assert len(found) == 12 + 2
    assert all(torch.equal(weight, expected[name]) for name, weight in found.items())


def test_a_batch_with_nothing_to_learn_has_no_loss_and_no_gradient() -> None:
    model, given = tiny(), batch()._replace(mask=torch.zeros(3, 16, dtype=torch.bool))
    nats = supervised_nats(model, *given)
    assert nats.item() == 0
    assert all(not gradient.any() for gradient in gradients(model, nats).values())
    assert token_nats(model, *given).shape == (0,)


def test_the_first_token_of_a_sequence_is_predicted_from_nothing() -> None:
    mask = torch.zeros(3, 16, dtype=torch.bool)
    mask[:, 0] = True
    assert token_nats(tiny(), *batch()._replace(mask=mask)).shape == (0,)


def test_bfloat16_products_keep_the_softmax_in_float32() -> None:
    model, given = tiny(), batch()
    exact = supervised_nats(model, *given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = supervised_nats(model, *given, chunk=8)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=5e-3, atol=0)
    expected = gradients(model, exact)["transformer.wte.weight"]
    found = gradients(model, rough)["transformer.wte.weight"]
    assert torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.999
