"""vq_linear: checks its arguments and calls the operator, or takes the plain product with the whole decoded weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel_kernels import vq_plain
from dit_accel_kernels.errors import KernelError
from dit_accel_kernels.vq_operator import operator
from dit_accel_kernels.vq_validation import check_added, check_codes, check_input, check_rotation


def vq_linear(
    x: Tensor,
    codes: Tensor,
    row_scale: Tensor,
    codebook: Tensor,
    *,
    code_bits: int,
    signs: Tensor | None = None,
    block: int = 0,
    low_rank: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    scratch_mb: float = 32.0,
    impl: str = "auto",
) -> Tensor:
    """x W^T + bias for a weight W [O, I] in codes, never holding all of W.

    With x' = hadamard(x * signs), or x without signs: x' W'^T + (x' a^T) b^T + bias, where row o of W' is row_scale_o
    times the sum over stages s of the codewords codebook[s, code].

    Args:
        x: [..., I], float32, bfloat16 or float16 (float64 in plain PyTorch).
        codes: uint8 [O, ceil(S * I / d * code_bits / 8)]: rows of codes, bit-packed, stage after stage.
        row_scale: [O].
        codebook: [S, K, d], d a divisor of I and K at most 2 ** code_bits; codes of K and more count as zeros.
        code_bits: 4, 6, 8 or 12.
        signs: uint8 [ceil(I / 8)], bit i % 8 of byte i // 8 set for -1; None where inputs are not rotated.
        block: of the Hadamard transform, a power of two that divides I; 0 or 1 without signs.
        low_rank: (a [r, I], b [O, r]) in rotated inputs, or None.
        bias: [O] or None.
        scratch_mb: MiB of memory taken beside the result and the rotated x, at the most (but enough for one row, or a
            panel of 16 tokens with a few decoded rows a thread); kept for the next call.
        impl: "auto", or one by name. "cpu": own C++ kernel, compiled at first use. "triton": CUDA. "torch": tile by
            tile in PyTorch. "reference": the whole weight at once; the only one that is differentiable by row_scale,
            codebook and low_rank, so what "auto" means where these require a gradient. All are by x and bias.

    Returns:
        [..., O] in x's dtype.

    Raises:
        KernelError: an argument is not allowed.
        KernelUnavailableError: `impl` was asked for by name and cannot run here.
    """
    check_input(x, impl, scratch_mb)
    check_codes(x, codes, row_scale, codebook, code_bits)
    check_rotation(x, signs, block)
    check_added(x, row_scale.shape[0], low_rank, bias)
    impl = with_gradient(impl, row_scale, codebook, low_rank)
    if impl == "reference":
        weight = vq_plain.Weight(codes, row_scale, codebook, code_bits, x.shape[-1], signs, block, low_rank)
        turned = vq_plain.rotate(x, signs, block)
        return F.linear(turned, vq_plain.dense(weight, x.dtype), bias if bias is None else bias.to(x.dtype))
    first, second = low_rank if low_rank is not None else (None, None)
    return operator(
        x, codes, row_scale, codebook, signs, first, second, bias, code_bits, block, float(scratch_mb), impl
    )


def with_gradient(impl: str, row_scale: Tensor, codebook: Tensor, low_rank: tuple[Tensor, Tensor] | None) -> str:
    """`impl`, or what "auto" means where a part of the weight requires a gradient; other implementations have none."""
    if impl == "reference" or not torch.is_grad_enabled():
        return impl
    parts = {"row_scale": (row_scale,), "codebook": (codebook,), "low_rank": low_rank or ()}
    for name, tensors in parts.items():
        if any(tensor.requires_grad for tensor in tensors):
            if impl == "auto":
                return "reference"
            raise KernelError(f"{name} requires a gradient, but impl={impl!r} gives it none; use impl='reference'.")
    return impl
