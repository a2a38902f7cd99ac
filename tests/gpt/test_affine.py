"""Our products are those of transformers, and so are their gradients, by any kernels, inputs kept or made again."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import LayerNorm
from transformers.pytorch_utils import Conv1D

from tasks.gpt import affine
from tasks.gpt.affine import Affine, adopt, multiply, product_of

Parts = tuple[LayerNorm, Conv1D, Tensor]


@pytest.fixture(autouse=True, params=[False, True], ids=["torch", "oneDNN"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param and not affine.THERE:
        pytest.skip("torch goes elsewhere than to MKL")
    monkeypatch.setattr(affine, "PAYS", request.param)


def parts() -> Parts:
    torch.manual_seed(0)
    return LayerNorm(24), Conv1D(40, 24), torch.randn(2, 16, 24, requires_grad=True)


def gradients(given: Parts, applied: Callable[[Tensor], Tensor]) -> list[Tensor]:
    norm, product, states = given
    made = applied(states)
    wanted = [states, norm.weight, norm.bias, product.weight, product.bias]
    return [made, *torch.autograd.grad((made * torch.linspace(0, 1, 40)).sum(), wanted)]


def test_products_and_gradients_are_those_of_transformers() -> None:
    norm, product, _ = given = parts()
    expected = gradients(given, lambda x: product(norm(x)))
    adopt(product)
    assert isinstance(product, Affine)
    for found, wanted in zip(gradients(given, lambda x: product(norm(x))), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_inputs_made_again_are_those_kept_to_the_bit() -> None:
    norm, product, _ = given = parts()
    adopt(product)
    kept = gradients(given, lambda x: product(norm(x)))
    again = gradients(given, lambda x: product_of(product, norm(x), norm.forward, x))
    assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))


def test_inputs_made_again_are_not_kept() -> None:
    norm, product, states = parts()
    adopt(product)
    kept: set[int] = set()

    def note(tensor: Tensor) -> Tensor:
        kept.add(tensor.data_ptr())
        return tensor

    normed = norm(states)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        product_of(product, normed, norm.forward, states)
    assert kept == {product.weight.data_ptr(), states.data_ptr()}


def test_a_product_in_half_precision_is_transformers_own() -> None:
    _, product, states = parts()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = product(states)
        adopt(product)
        assert torch.equal(product(states), expected)


def test_columns_at_once_make_the_whole_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affine, "COLUMNS", 7)
    one, other, place = torch.randn(9, 5), torch.randn(20, 5).T, torch.empty(12, 20)
    multiply(one, other, place[:9])
    torch.testing.assert_close(place[:9], one @ other, rtol=1e-5, atol=1e-5)
