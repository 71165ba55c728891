"""Checks of the arguments of `vq_linear`: shapes, dtypes, devices; never values, which would take a pass each call."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dit_accel_kernels.errors import KernelError
from dit_accel_kernels.vq_plain import WORDS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IMPLEMENTATIONS = ("auto", "cpu", "torch", "triton", "reference")


def check_input(x: Tensor, impl: str, scratch_mb: float) -> None:
    """x [..., I], and the settings of a call."""
    if not isinstance(x, Tensor) or x.dim() < 1 or x.shape[-1] < 1:
        given = f"of shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise KernelError(f"x is {given}, but it must be a tensor [..., I] with I of 1 or more.")
    if x.dtype not in DTYPES:
        raise KernelError(f"x is {x.dtype}, but it must be float32, bfloat16, float16 or float64; use x.to().")
    if impl not in IMPLEMENTATIONS:
        raise KernelError(f"impl is {impl!r}, but it must be one of {', '.join(IMPLEMENTATIONS)}.")
    if not 0 < scratch_mb < math.inf:
        raise KernelError(f"scratch_mb is {scratch_mb}, but it must be a positive number of MiB; 32 is the default.")


def check_codes(x: Tensor, codes: Tensor, row_scale: Tensor, codebook: Tensor, code_bits: int) -> None:
    """codes uint8 [O, ceil(S * I / d * code_bits / 8)], row_scale [O], codebook [S, K, d], for x [..., I]."""
    if code_bits not in WORDS:
        raise KernelError(f"code_bits is {code_bits}, but it must be 4, 6, 8 or 12.")
    for name, tensor, dims, shape in (
        ("codes", codes, 2, "[O, bytes]"),
        ("row_scale", row_scale, 1, "[O]"),
        ("codebook", codebook, 3, "[S, K, d]"),
    ):
        check_tensor(name, tensor, dims, shape, x, torch.uint8 if name == "codes" else None)
    stages, entries, width = codebook.shape
    inputs = x.shape[-1]
    if not codebook.numel() or entries > 1 << code_bits:
        raise KernelError(
            f"codebook has shape {list(codebook.shape)}, but it must be [S, K, d] with K from 1 to {1 << code_bits}, "
            f"what {code_bits} bits hold."
        )
    if inputs % width:
        raise KernelError(f"x has {inputs} inputs, but they must be a multiple of d = {width}, the codebook's width.")
    length = -(-stages * (inputs // width) * code_bits // 8)
    if codes.shape[1] != length or codes.shape[0] != row_scale.shape[0] or not codes.shape[0]:
        raise KernelError(
            f"codes is of shape {list(codes.shape)} and row_scale of {list(row_scale.shape)}, but for {inputs} inputs, "
            f"{stages} stages of width {width} and {code_bits} bits they must be [O, {length}] and [O], O 1 or more."
        )


def check_rotation(x: Tensor, signs: Tensor | None, block: int) -> None:
    """signs uint8 [ceil(I / 8)] with block a power of two that divides I; no signs, no block."""
    if signs is None:
        if block not in (0, 1):
            raise KernelError(f"block is {block} without signs, but a rotation needs both; give signs, or block=0.")
        return
    check_tensor("signs", signs, 1, "[ceil(I / 8)]", x, torch.uint8)
    inputs = x.shape[-1]
    if signs.shape[0] != -(-inputs // 8):
        raise KernelError(
            f"signs has {signs.shape[0]} bytes, but {inputs} inputs take {-(-inputs // 8)}, a bit for each input."
        )
    if block < 1 or block & (block - 1) or inputs % block:
        raise KernelError(f"block is {block}, but it must be a power of two that divides the {inputs} inputs.")


def check_added(x: Tensor, outputs: int, low_rank: tuple[Tensor, Tensor] | None, bias: Tensor | None) -> None:
    """low_rank (a [r, I], b [O, r]) and bias [O]."""
    if low_rank is not None:
        if not isinstance(low_rank, (tuple, list)) or len(low_rank) != 2:
            raise KernelError(f"low_rank is {type(low_rank).__name__}, but it must be a pair (a [r, I], b [O, r]).")
        first, second = low_rank
        check_tensor("low_rank's a", first, 2, "[r, I]", x)
        check_tensor("low_rank's b", second, 2, "[O, r]", x)
        if first.shape[1] != x.shape[-1] or second.shape[0] != outputs or first.shape[0] != second.shape[1]:
            raise KernelError(
                f"low_rank's a is {list(first.shape)} and b {list(second.shape)}, but they must be [r, I] and [O, r] "
                f"with I = {x.shape[-1]} and O = {outputs}."
            )
    if bias is not None:
        check_tensor("bias", bias, 1, "[O]", x)
        if bias.shape[0] != outputs:
            raise KernelError(f"bias has {bias.shape[0]} entries, but there are {outputs} outputs.")


def check_tensor(name: str, tensor: Tensor, dims: int, shape: str, x: Tensor, dtype: torch.dtype | None = None) -> None:
    """A tensor of so many dimensions on x's device; of `dtype`, or of floats where that is None."""
    if not isinstance(tensor, Tensor) or tensor.dim() != dims:
        given = f"of shape {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise KernelError(f"{name} is {given}, but it must be a tensor {shape}.")
    if tensor.dtype != dtype if dtype else tensor.dtype not in DTYPES:
        raise KernelError(f"{name} is {tensor.dtype}, but it must be {'uint8' if dtype else 'of floats'}.")
    if tensor.device != x.device:
        raise KernelError(
            f"{name} is on {tensor.device} and x on {x.device}, but all must be on one device; use .to()."
        )
