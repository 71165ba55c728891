"""vq_linear by Triton programs, for CUDA. Not measured on a GPU: checked in Triton's interpreter only.

Few tokens: one program looks weights up and multiplies them. Many: rows are decoded into the scratch buffer and
multiplied by cuBLAS there (vq_tiles.py). The rotation is a few small products of torch, either way.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from dit_accel_kernels import vq_plain
from dit_accel_kernels.triton_kernel import DTYPES, interpreted
from dit_accel_kernels.vq_plain import Weight

FUSED_TOKENS = 64  # up to which weights are looked up within the product; a guess, not measured
TOKENS, ROWS, COLUMNS = 16, 64, 64  # of one product


def unavailable(x: Tensor) -> str | None:
    """Why the kernel cannot take x, in words; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if x.device.type != "cuda" and not (interpreted() and x.device.type == "cpu"):
        return f"x is on {x.device}, and Triton needs a CUDA device (or TRITON_INTERPRET=1 in the environment)"
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}, and the kernel takes float32, bfloat16 and float16"
    return None


def product(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x [T, I] -> [T, O] in x's dtype by the program that looks weights up; beside it x in rotated inputs is kept."""
    from dit_accel_kernels.vq_triton_program import multiply_tile

    turned = vq_plain.rotate(x, weight.signs, weight.block)
    turned = turned if turned.stride(1) == 1 else turned.contiguous()
    out = torch.empty(len(x), weight.outputs, dtype=x.dtype, device=x.device)
    if not len(x):
        return out
    added = out
    if weight.low_rank is not None:
        first, second = (part.detach().to(x.dtype) for part in weight.low_rank)
        added = (turned @ first.T) @ second.T
    codes, scales, table = parts_of(weight, x.dtype)
    program: Any = multiply_tile[(-(-len(x) // TOKENS), -(-weight.outputs // ROWS))]
    program(
        turned,
        codes,
        scales,
        table,
        added,
        bias.detach() if bias is not None else scales,
        out,
        turned.stride(0),
        codes.stride(0),
        len(x),
        weight.inputs,
        weight.outputs,
        weight.inputs // table.shape[2],
        codes.shape[1],
        STAGES=len(table),
        BITS=weight.code_bits,
        WIDTH=table.shape[2],
        ADDED=weight.low_rank is not None,
        BIASED=bias is not None,
        UPCAST=interpreted() and x.dtype == torch.bfloat16,
        TOKENS=TOKENS,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
    )
    return out


def decode_into(weight: Weight, table: Tensor, rows: slice, out: Tensor) -> Tensor:
    """Rows from codes and scales alone -> `out` [rows, I], overwritten, in its dtype."""
    from dit_accel_kernels.vq_triton_program import decode_tile

    codes, scales = weight.codes[rows], weight.row_scale[rows].detach().float().contiguous()
    codes = codes if codes.stride(1) == 1 else codes.contiguous()
    program: Any = decode_tile[(-(-len(codes) // 8), -(-weight.inputs // 256))]
    program(
        codes,
        scales,
        table,
        out,
        codes.stride(0),
        weight.inputs,
        len(codes),
        weight.inputs // table.shape[2],
        codes.shape[1],
        STAGES=len(table),
        BITS=weight.code_bits,
        WIDTH=table.shape[2],
        ROWS=8,
        COLUMNS=256,
    )
    return out


def parts_of(weight: Weight, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Codes with contiguous rows, scales in float32, and the table of codewords in `dtype`."""
    codes = weight.codes if weight.codes.stride(1) == 1 else weight.codes.contiguous()
    return codes, weight.row_scale.detach().float().contiguous(), weight.table(dtype)
