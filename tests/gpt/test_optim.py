import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from tasks.gpt.optim import adamw, clip_gradients, grad_norm_squared, moments, set_moments, set_rate


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    ids = torch.arange(5)
    for _ in range(steps):
        net(ids).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in net.named_parameters()}


def test_matrices_decay_and_vectors_do_not() -> None:
    net = model()
    before = weights(net)
    optimizer = adamw(net, lr=0.5, weight_decay=0.1)
    for weight in net.parameters():
        weight.grad = torch.zeros_like(weight)  # no slope: what changes is decay alone
    optimizer.step()
    for name, weight in net.named_parameters():
        expected = before[name] * (0.95 if weight.dim() == 2 else 1.0)
        torch.testing.assert_close(weight.detach(), expected)


def test_an_optimizer_given_saved_moments_goes_on_to_the_bit() -> None:
    straight, cut = model(), model()
    whole = adamw(straight, lr=0.1, weight_decay=0.1)
    train(straight, whole, 5)
    first = adamw(cut, lr=0.1, weight_decay=0.1)
    train(cut, first, 3)
    second = adamw(cut, lr=0.1, weight_decay=0.1)
    saved = {name: tensor.clone() for name, tensor in moments(first, cut).items()}
    assert "exp_avg_sq/2.weight" in saved
    set_moments(second, cut, saved)
    train(cut, second, 2)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), cut.parameters(), strict=True))


def test_an_optimizer_without_its_moments_goes_elsewhere() -> None:
    straight, cut = model(), model()
    train(straight, adamw(straight, lr=0.1, weight_decay=0.1), 5)
    train(cut, adamw(cut, lr=0.1, weight_decay=0.1), 3)
    train(cut, adamw(cut, lr=0.1, weight_decay=0.1), 2)
    assert not torch.equal(straight[2].weight, cut[2].weight)  # type: ignore[index]


def test_before_the_first_update_there_are_no_moments() -> None:
    net = model()
    assert moments(adamw(net, lr=0.1, weight_decay=0.1), net) == {}


def test_a_rate_of_zero_changes_nothing() -> None:
    net = model()
    before = weights(net)
    optimizer = adamw(net, lr=0.1, weight_decay=0.1)
    set_rate(optimizer, 0.0)
    train(net, optimizer, 1)
    assert all(torch.equal(weight, before[name]) for name, weight in net.named_parameters())


def test_the_length_of_a_gradient_is_exact_where_torchs_own_sum_is_short_and_is_the_same_in_parts() -> None:
    table = torch.randn(50_304, 64, generator=torch.Generator().manual_seed(0))
    vector = torch.randn(3_000, generator=torch.Generator().manual_seed(1))
    exact = (table.double().square().sum() + vector.double().square().sum()).item()
    assert grad_norm_squared([table, vector]).item() == pytest.approx(exact, rel=1e-7)
    parts = grad_norm_squared([table[:25_000], vector]) + grad_norm_squared([table[25_000:], vector[:0]])
    assert parts.item() == pytest.approx(grad_norm_squared([table, vector]).item(), rel=1e-14)


@pytest.mark.parametrize("most", [0.5, 1e9])
def test_a_gradient_is_shortened_as_by_torch(most: float) -> None:
    net, other = model(), model()
    for one in (net, other):
        one(torch.arange(5)).square().sum().backward()
    expected = clip_grad_norm_(other.parameters(), most).item()
    gradients = [weight.grad for weight in net.parameters() if weight.grad is not None]
    length = grad_norm_squared(gradients).sqrt().item()
    assert length == pytest.approx(expected, rel=1e-6)
    clip_gradients(gradients, length, most)
    for weight, reference in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, reference.grad, rtol=1e-5, atol=0)
