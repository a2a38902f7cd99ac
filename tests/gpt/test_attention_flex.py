"""The law that both ways to attend are one rule: the block mask is the boolean mask, and the results are the same."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from tasks.errors import ConfigurationError, ParameterError
from tasks.gpt.attention import set_way, visible, way_for
from tasks.gpt.attention_flex import BLOCK, block_mask
from tasks.gpt.forward import Trunk, hidden_states, recomputing
from tasks.gpt.loss import supervised_nats
from tasks.gpt.weights import build_start, scratch_spec

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def trees(length: int, rows: int, seed: int) -> Tensor:
    """Draw the ends of packed trees: each message ends where its subtree does; padding, of ends 0, comes last."""
    draw = np.random.default_rng(seed)
    made = np.zeros((rows, length), np.int64)
    for row in range(rows):
        filled = int(draw.integers(length // 2, length + 1))
        todo = [(0, filled)]
        while todo:
            first, last = todo.pop()
            own = min(last, first + int(draw.integers(1, 90)))
            made[row, first:own] = last
            cut = int(draw.integers(own, last)) if last - own > 1 else last
            todo += [(low, high) for low, high in ((own, cut), (cut, last)) if high > low]
    return torch.from_numpy(made)


def assert_equal_masks(ends: Tensor) -> None:
    rows, length = ends.shape
    seen, found = visible(ends), block_mask(ends)

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return seen[b, 0, q, k]

    expected = create_block_mask(rule, rows, None, length, length, device="cpu", BLOCK_SIZE=BLOCK)
    assert found.shape == expected.shape
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "q_indices"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=0, msg=name)
    at = torch.arange(length)
    assert found.mask_mod is not None
    each = found.mask_mod(torch.arange(rows)[:, None, None], torch.tensor(0), at[:, None], at[None, :])
    assert torch.equal(each, seen[:, 0])


@settings(max_examples=20)
@given(st.sampled_from([1, 100, 128, 129, 384, 500]), st.integers(1, 3), st.integers(0, 2**32))
def test_the_block_mask_is_the_boolean_mask_on_random_trees(length: int, rows: int, seed: int) -> None:
    assert_equal_masks(trees(length, rows, seed))


def test_a_document_alone_and_padding_alone_are_masks_too() -> None:
    for length in (128, 300):
        assert_equal_masks(torch.full((2, length), length + 1))  # one past the end, as of a sequence that lost a token
        assert_equal_masks(torch.zeros(2, length, dtype=torch.long))


def heads(ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return tuple(torch.randn(len(ends), 2, ends.shape[1], 16, generator=draw) for _ in range(3))  # type: ignore[return-value]


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize(
    "compiled",
    [False, pytest.param(True, marks=[pytest.mark.slow])],
    ids=["eager", "compiled"],
)
def test_both_ways_to_attend_give_the_same(compiled: bool) -> None:
    ends = trees(300, 2, seed=4)
    attend: Any = torch.compile(flex_attention) if compiled else flex_attention
    with torch.no_grad():
        found = attend(*heads(ends), block_mask=block_mask(ends))
        expected = scaled_dot_product_attention(*heads(ends), attn_mask=visible(ends))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_blocks_are_for_compiled_runs_on_a_gpu_without_dropout() -> None:
    assert way_for("auto", CUDA, True, 0.0) == "flex"
    assert way_for("auto", CUDA, True, 0.1) == "sdpa"
    assert way_for("auto", CUDA, False, 0.0) == "sdpa"
    assert way_for("auto", CPU, False, 0.0) == "parts"
    assert way_for("auto", CPU, True, 0.0) == "sdpa"
    assert way_for("flex", CUDA, True, 0.0) == "flex"
    assert way_for("sdpa", CUDA, True, 0.0) == "sdpa"
    with pytest.raises(ConfigurationError, match=r"config\.attention"):
        way_for("flex", CPU, True, 0.0)
    for compiled, dropout in ((False, 0.0), (True, 0.1)):
        with pytest.raises(ParameterError, match=r"param\.attention"):
            way_for("flex", CUDA, compiled, dropout)


def test_what_is_not_compiled_attends_by_the_mask_whatever_was_asked() -> None:
    model, ends = tiny(), trees(256, 2, seed=1)
    given = batch(ends)
    plain = supervised_nats(model, *given)
    set_way(model, "flex")
    assert torch.equal(supervised_nats(model, *given), plain)


def tiny() -> Any:
    return build_start(scratch_spec(layers=2, heads=2, width=32, positions=512, vocab_size=64, seed=0)).eval()


def batch(ends: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 64, ends.shape, generator=draw)
    return ids, torch.rand(ends.shape, generator=draw) < 0.5, torch.arange(ends.shape[1]).expand(ends.shape), ends


@pytest.mark.slow
def test_a_compiled_pass_by_blocks_gives_the_loss_of_the_mask() -> None:
    model, given = tiny(), batch(trees(257, 2, seed=2))
    trunk = torch.compile(hidden_states)
    with torch.no_grad():
        plain = supervised_nats(model, *given)
        set_way(model, "flex")
        torch.testing.assert_close(supervised_nats(model, *given, trunk=trunk), plain, rtol=1e-5, atol=0)


@pytest.mark.parametrize("trunk", [hidden_states, recomputing], ids=["kept", "recomputed"])
def test_the_way_back_of_a_pass_by_blocks_gives_the_gradients_of_the_mask(
    trunk: Trunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch refuses this way back on a CPU, for want of a kernel; uncompiled, it has it spelled out in full scores."""
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)
    model, given = tiny(), batch(trees(300, 2, seed=3))
    plain, expected = way_back(model, given, trunk)
    set_way(model, "flex")
    nats, found = way_back(model, given, torch.compile(trunk, backend="aot_eager"))
    assert nats == pytest.approx(plain, rel=1e-5)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm().clamp_min(1e-6), name


def way_back(model: Any, given: tuple[Tensor, ...], trunk: Trunk) -> tuple[float, dict[str, Tensor]]:
    """The loss of a pass, and its gradients by name."""
    model.zero_grad()
    nats = supervised_nats(model, *given, trunk=trunk)
    nats.backward()  # type: ignore[no-untyped-call]
    return nats.item(), {name: weight.grad.to_dense() for name, weight in model.named_parameters()}


@pytest.mark.gpu
def test_loss_and_gradients_by_blocks_are_those_of_the_mask() -> None:
    model = tiny().to(CUDA)
    ids, mask, positions, ends = batch(trees(512, 4, seed=3))
    given, found = (ids.to(CUDA), mask, positions.to(CUDA), ends.to(CUDA)), []
    for way in ("sdpa", "flex"):
        set_way(model, way)
        found.append(way_back(model, given, torch.compile(hidden_states)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    for name, expected in found[0][1].items():
        assert (found[1][1][name] - expected).norm() <= 1e-3 * expected.norm().clamp_min(1e-6), name
