"""Attention by parts is that of the mask, there and back, and computes little that nobody sees."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tasks.gpt.attention import visible
from tasks.gpt.attention_cpu import QUERIES, attend, parts

SCALE = 0.3


def trees(length: int, sequences: int, seed: int) -> Tensor:
    """Ends of packed random trees: a message after another, below one that is still open, or a tree of its own."""
    draw = torch.Generator().manual_seed(seed)
    made = torch.empty(sequences, length, dtype=torch.long)
    for row in made:
        opened: list[int] = []  # where messages of the branch start
        at = 0
        while at < length:
            keep = int(torch.randint(0, len(opened) + 1, (), generator=draw))
            for start in opened[keep:]:
                row[start:at][row[start:at] > at] = at
            opened = [*opened[:keep], at]
            size = int(torch.randint(1, 90, (), generator=draw))
            row[at : at + size] = length
            at += size
    return made


def of(ends: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Queries, keys and values, as a block lays them out."""
    rows, length = ends.shape
    packed = torch.randn(rows, length, 3, 2, 8, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return tuple(part.transpose(1, 2).detach().requires_grad_() for part in packed.unbind(2))


@pytest.mark.parametrize("length", [1, QUERIES - 1, QUERIES, 5 * QUERIES + 7])
def test_parts_give_what_the_mask_gives_there_and_back(length: int) -> None:
    ends = trees(length, 3, seed=length)
    q, k, v = given = of(ends)
    found = attend(q, k, v, parts(ends), SCALE)
    expected = scaled_dot_product_attention(q, k, v, attn_mask=visible(ends), scale=SCALE)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    slope = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    ways = (torch.autograd.grad(made, given, slope) for made in (found, expected))
    for ours, theirs in zip(*ways, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_no_part_holds_a_key_that_none_of_its_queries_sees() -> None:
    ends = trees(700, 2, seed=5)
    for part in parts(ends):
        assert (part.bias == 0).any(dim=0).all()
        assert (part.bias == 0).any(dim=1).all()
    computed = sum(part.bias.numel() for part in parts(ends))
    assert computed < 0.7 * sum(range(0, 701, QUERIES)) * QUERIES * len(ends)  # of what causality alone would leave


def test_queries_are_each_in_one_part() -> None:
    found = [(part.row, at) for part in parts(trees(300, 2, seed=6)) for at in range(*part.queries.indices(300))]
    assert found == [(row, at) for row in range(2) for at in range(300)]


def test_numbers_of_16_bits_are_mixed_in_32() -> None:
    ends = trees(200, 1, seed=7)
    q, k, v = of(ends, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attend(q, k, v, parts(ends), SCALE)
    exact = attend(q.float(), k.float(), v.float(), parts(ends), SCALE)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.bfloat16())


def test_padding_gives_no_nan_whatever_its_ends_say() -> None:
    ends = torch.zeros(1, 100, dtype=torch.long)
    q, k, v = of(ends)
    assert attend(q, k, v, parts(ends), SCALE).isfinite().all()
