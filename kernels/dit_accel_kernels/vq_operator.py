"""torch's operator dit_accel::vq_linear: what runs, its shape, its gradient by x and its FLOPs.

As an operator it is one opaque step for torch.compile and for whoever counts FLOPs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dit_accel_kernels import vq_cpu, vq_tiles, vq_triton_kernel
from dit_accel_kernels.errors import KernelUnavailableError
from dit_accel_kernels.vq_plain import Weight

Sizes = tuple[int, ...]


@torch.library.custom_op("dit_accel::vq_linear", mutates_args=())
def operator(
    x: Tensor,
    codes: Tensor,
    row_scale: Tensor,
    codebook: Tensor,
    signs: Tensor | None,
    low_a: Tensor | None,
    low_b: Tensor | None,
    bias: Tensor | None,
    code_bits: int,
    block: int,
    scratch_mb: float,
    impl: str,
) -> Tensor:
    """x [..., I] -> [..., O], checked by the caller; low_a and low_b are the low-rank factors."""
    weight = weight_of(x.shape[-1], codes, row_scale, codebook, signs, low_a, low_b, code_bits, block)
    tokens, limit = x.detach().reshape(-1, weight.inputs), int(scratch_mb * 2**20)
    chosen = choose(tokens, weight, impl)
    if chosen == "cpu":
        out = vq_cpu.product(tokens, weight, bias, limit)
    elif chosen == "triton" and vq_triton_kernel.fuses(
        tokens, weight, vq_tiles.rows_of(weight, x.dtype, limit, chosen)
    ):
        out = vq_triton_kernel.product(tokens, weight, bias)
    else:
        out = vq_tiles.product(tokens, weight, bias, limit, chosen)
    return out.view(*x.shape[:-1], weight.outputs)


@torch.library.custom_op("dit_accel::vq_linear_input_gradient", mutates_args=())
def gradient_operator(
    gradient: Tensor,
    inputs: int,
    codes: Tensor,
    row_scale: Tensor,
    codebook: Tensor,
    signs: Tensor | None,
    low_a: Tensor | None,
    low_b: Tensor | None,
    code_bits: int,
    block: int,
    scratch_mb: float,
    impl: str,
) -> Tensor:
    """Gradient [..., O] of the result -> [..., I] of x."""
    weight = weight_of(inputs, codes, row_scale, codebook, signs, low_a, low_b, code_bits, block)
    rows = gradient.detach().reshape(-1, weight.outputs)
    found = vq_tiles.input_gradient(rows, weight, int(scratch_mb * 2**20), choose(rows, weight, impl))
    return found.view(*gradient.shape[:-1], inputs)


def weight_of(
    inputs: int,
    codes: Tensor,
    row_scale: Tensor,
    codebook: Tensor,
    signs: Tensor | None,
    low_a: Tensor | None,
    low_b: Tensor | None,
    code_bits: int,
    block: int,
) -> Weight:
    """The weight from the flat arguments of an operator."""
    low_rank = (low_a, low_b) if low_a is not None and low_b is not None and low_a.shape[0] else None
    return Weight(codes, row_scale, codebook, code_bits, inputs, signs, block, low_rank)


def choose(x: Tensor, weight: Weight, impl: str) -> str:
    """ "cpu", "torch" or "triton": what `impl` means for x [T, I]; may compile the C++ kernel."""
    width = weight.codebook.shape[2]
    if impl in ("cpu", "triton"):
        reason = vq_cpu.unavailable(x) if impl == "cpu" else vq_triton_kernel.unavailable(x, width)
        if reason:
            raise KernelUnavailableError(f"impl={impl!r} cannot run here: {reason}; use impl='auto'.")
        return impl
    if impl == "torch":
        return impl
    if x.device.type == "cpu":
        return "torch" if vq_cpu.unavailable(x) else "cpu"
    return "torch" if vq_triton_kernel.unavailable(x, width) else "triton"


@operator.register_fake
def _(x: Tensor, codes: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@gradient_operator.register_fake
def _(gradient: Tensor, inputs: int, *_: Any) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], inputs)


def keep_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Note the weight, which the gradient by x needs; x itself is not kept."""
    del output
    x, *tensors, bias, code_bits, block, scratch_mb, impl = inputs
    ctx.save_for_backward(*tensors)
    ctx.inputs, ctx.settings = x.shape[-1], (code_bits, block, scratch_mb, impl)
    ctx.bias_dtype = None if bias is None else bias.dtype


def gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """By x and by the bias; scales, codebook and low rank have none here (impl="reference" has)."""
    by_x = by_bias = None
    if ctx.needs_input_grad[0]:
        by_x = gradient_operator(gradient, ctx.inputs, *ctx.saved_tensors, *ctx.settings)
    if ctx.needs_input_grad[7]:
        by_bias = gradient.flatten(0, -2).sum(0) if gradient.dim() > 1 else gradient
        by_bias = by_bias.to(ctx.bias_dtype)
    return (by_x, *[None] * 6, by_bias, *[None] * 4)


operator.register_autograd(gradients, setup_context=keep_for_gradient)


@register_flop_formula(torch.ops.dit_accel.vq_linear)
def flops(x: Sizes, codes: Sizes, *others: Any, out_shape: Any = None, **_: Any) -> int:
    """FLOPs of the dense product and of the low-rank part, two to a multiply-add; decoding counts nothing."""
    del out_shape
    low_a = others[3] if len(others) > 3 else None
    rank = low_a[0] if low_a is not None else 0
    tokens, inputs, outputs = math.prod(x[:-1]), x[-1], codes[0]
    return 2 * tokens * (inputs * outputs + rank * (inputs + outputs))


@register_flop_formula(torch.ops.dit_accel.vq_linear_input_gradient)
def gradient_flops(gradient: Sizes, inputs: int, codes: Sizes, *others: Any, out_shape: Any = None, **_: Any) -> int:
    """As of the product itself: each weight is used once for each token."""
    del out_shape
    return flops((*gradient[:-1], inputs), codes, *others)
