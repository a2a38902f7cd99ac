"""The products of a block: GPT-2's own weights, multiplied on a CPU by the kernels that suit it, inputs made again.

Torch gives products of float32 matrices to MKL, which is at home on Intel's processors. On a Zen 4 core oneDNN, which
torch brings along, is faster by 4 to 20 % for the shapes of a block; on a Sapphire Rapids core it takes 1.0 to 2.1
times as long, and a step of training 1.1 times.

Legend: R rows, I numbers that come in, O that go out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

Again = Callable[[Tensor], Tensor]
# Only where torch would go to MKL: other builds have chosen for their processors.
THERE = torch.backends.mkl.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # type: ignore[no-untyped-call]
# Settled by the processor, not by a race: who wins a close one would change from run to run, and with it the rounding.
PAYS = THERE and "Intel" not in str(torch.cpu.get_capabilities().get("cpu_name"))
COLUMNS = 8_192  # of the head at once: 7 % slower than all of them where D is 384, 4 % at 768


class Affine(Conv1D):  # type: ignore[misc]
    """A product with a matrix (I, O), and a bias, as transformers has it; only the kernels are others."""

    def forward(self, inputs: Tensor, again: Again | None = None, source: Tensor | None = None) -> Tensor:
        """Return the product, (..., O).

        Args:
            inputs: (..., I).
            again: Makes the inputs, to the bit, of `source`, in little time; then only that is kept for the way back.
            source: What somebody else keeps anyway.
        """
        rows = inputs.numel() // inputs.shape[-1]
        if rows == 1 or not _suits(inputs):  # a single row is less work for torch's own
            plain: Tensor = super().forward(inputs)
            return plain
        given = inputs.reshape(rows, -1)  # (R, I)
        made: Tensor = _Product.apply(given, self.weight, self.bias, again, source)  # type: ignore[no-untyped-call]
        return made.view(*inputs.shape[:-1], -1)


def adopt(product: Conv1D) -> None:
    """Let a product of transformers go our way; its weights, and their names, stay what they are."""
    product.__class__ = Affine


def lean(model: GPT2LMHeadModel) -> bool:
    """Tell whether a model's products keep little for the way back, on a CPU in float32."""
    return all(isinstance(block.mlp.c_proj, Affine) for block in model.transformer.h)


def product_of(product: Any, inputs: Tensor, again: Again, source: Tensor) -> Tensor:
    """Apply a product, whatever it is by now; adapters beside it, for one, want to keep the inputs themselves."""
    made: Tensor = product(inputs, again, source) if isinstance(product, Affine) else product(inputs)
    return made


def matmul(one: Tensor, other: Tensor) -> Tensor:
    """Return (R, I) times (I, O), for few rows: oneDNN's head of 1 to 64 takes 0.5 to 0.75 of MKL's time on Zen 4.

    On Sapphire Rapids it takes 0.5 to 0.7 of it with 4 to 8 rows, as long with more, and longer with 1 or 2.
    """
    quick = THERE and (PAYS or len(one) > 2) and _suits(one)
    return _pointwise(one, other.T, None) if quick else one @ other


def multiply(one: Tensor, other: Tensor, out: Tensor) -> None:
    """Write (R, I) times (I, O) into a place of that shape, (R, O).

    oneDNN lays the second factor out anew, and takes no place to write to: columns at once, that is 40 MB, not 250.
    """
    if not (PAYS and _suits(one)):
        torch.mm(one, other, out=out)
        return
    for column in range(0, other.shape[1], COLUMNS):
        some = slice(column, column + COLUMNS)
        out[:, some] = _pointwise(one, other[:, some].T, None)


def kernels() -> str:
    """Name whose kernels multiply in training, on a CPU in float32; another's would round otherwise."""
    return "oneDNN" if PAYS else "torch"


def _suits(inputs: Tensor) -> bool:
    return (
        inputs.device.type == "cpu"
        and inputs.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _times(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return (R, I) times the transpose of (O, I), plus (O,)."""
    return (_pointwise if PAYS else linear)(inputs, weight, bias)


def _pointwise(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Do the same by oneDNN."""
    made: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
    return made


class _Product(torch.autograd.Function):
    """`inputs @ weight + bias`, there and back."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor, again: Again | None, source: Tensor | None
    ) -> Tensor:
        """Multiply (R, I) with (I, O), and add (O,)."""
        ctx.again = again
        kept = inputs if again is None else source
        ctx.save_for_backward(weight, kept if ctx.needs_input_grad[1] else None)
        return _times(inputs, weight.T, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of all three."""
        weight, kept = ctx.saved_tensors
        slope, to_weight = slope.contiguous(), None
        if ctx.needs_input_grad[1]:
            inputs = kept if ctx.again is None else ctx.again(kept).view(len(slope), -1)
            to_weight = _times(inputs.T, slope.T, None)
            del inputs
        to_inputs = _times(slope, weight, None) if ctx.needs_input_grad[0] else None
        to_bias = slope.sum(0) if ctx.needs_input_grad[2] else None
        return to_inputs, to_weight, to_bias, None, None
