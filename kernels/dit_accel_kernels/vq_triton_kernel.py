"""vq_linear by Triton programs, for CUDA. Sizes of tiles were chosen on an H200 (docs/gpu.md).

Rows are decoded into the scratch buffer and multiplied by cuBLAS there (vq_tiles.py); or, for few tokens and a large
weight, one program looks weights up and multiplies them. x is rotated by a program of its own, either way.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from dit_accel_kernels import vq_plain
from dit_accel_kernels.triton_kernel import DTYPES, interpreted
from dit_accel_kernels.vq_plain import Weight

FUSED_TOKENS = 16  # up to which weights may be looked up within the product
TOKENS, ROWS, COLUMNS, WARPS = 16, 16, 256, 2  # of one product
DECODED_ROWS, DECODED_COLUMNS = 4, 512  # of the weight, by one program
SMALLEST, LARGEST = 16, 4096  # Hadamard blocks that the program takes; a product has 16 rows and columns at the least
ROTATED = 4096  # entries of x that one program rotates


def unavailable(x: Tensor, width: int = 1) -> str | None:
    """Why the programs cannot take x and codewords of so many weights, in words; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if x.device.type != "cuda" and not (interpreted() and x.device.type == "cpu"):
        return f"x is on {x.device}, and Triton needs a CUDA device (or TRITON_INTERPRET=1 in the environment)"
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}, and the kernel takes float32, bfloat16 and float16"
    if width & (width - 1):
        return f"a codeword has {width} weights, and the kernel takes powers of two"
    return None


def fuses(x: Tensor, weight: Weight, rows: int) -> bool:
    """True where `product` beats decoding: few tokens, and a weight that takes several tiles of so many rows, each with
    its launches. A weight of one tile is decoded in a fraction of the time (13 of 60 microseconds for 3072 x 3072)."""
    return x.shape[0] <= FUSED_TOKENS and rows < weight.outputs


def rotate(x: Tensor, weight: Weight, back: bool = False) -> Tensor:
    """x [T, I] in rotated inputs, or with `back` the inverse -> [T, I] in x's dtype; x itself without signs."""
    if weight.signs is None or not x.shape[0]:
        return x
    if not SMALLEST <= weight.block <= LARGEST:
        return (vq_plain.unrotate if back else vq_plain.rotate)(x, weight.signs, weight.block)
    from dit_accel_kernels.vq_triton_program import rotate_tile

    x = x if x.stride(1) == 1 else x.contiguous()
    left = 1 << (weight.block.bit_length() - 1) // 2 if weight.block >= SMALLEST**2 else 1
    tokens = max(1, SMALLEST // left, ROTATED // weight.block)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    program: Any = rotate_tile[(-(-x.shape[0] // tokens), weight.inputs // weight.block)]
    program(
        x,
        weight.signs,
        out,
        x.stride(0),
        x.shape[0],
        weight.inputs,
        LEFT=left,
        RIGHT=weight.block // left,
        TOKENS=tokens,
        BACK=back,
        UPCAST=interpreted() and x.dtype == torch.bfloat16,
    )
    return out


def product(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x [T, I] -> [T, O] in x's dtype by the program that looks weights up; beside it x in rotated inputs is kept."""
    from dit_accel_kernels.vq_triton_program import multiply_tile

    turned = rotate(x, weight)
    turned = turned if turned.stride(1) == 1 else turned.contiguous()
    out = torch.empty(x.shape[0], weight.outputs, dtype=x.dtype, device=x.device)
    if not x.shape[0]:
        return out
    added = out
    if weight.low_rank is not None:
        first, second = (part.detach().to(x.dtype) for part in weight.low_rank)
        added = (turned @ first.T) @ second.T
    codes, scales, table = parts_of(weight, x.dtype)
    program: Any = multiply_tile[(-(-x.shape[0] // TOKENS), -(-weight.outputs // ROWS))]
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
        x.shape[0],
        weight.inputs,
        weight.outputs,
        weight.inputs // table.shape[2],
        codes.shape[1],
        STAGES=table.shape[0],
        BITS=weight.code_bits,
        WIDTH=table.shape[2],
        ADDED=weight.low_rank is not None,
        BIASED=bias is not None,
        UPCAST=interpreted() and x.dtype == torch.bfloat16,
        TOKENS=TOKENS,
        ROWS=ROWS,
        COLUMNS=max(COLUMNS, table.shape[2]),
        num_warps=WARPS,
    )
    return out


def decode_into(weight: Weight, table: Tensor, rows: slice, out: Tensor) -> Tensor:
    """Rows from codes and scales alone -> `out` [rows, I], overwritten, in its dtype."""
    from dit_accel_kernels.vq_triton_program import decode_tile

    codes, scales = weight.codes[rows], weight.row_scale[rows].detach().contiguous()
    codes = codes if codes.stride(1) == 1 else codes.contiguous()
    columns = max(DECODED_COLUMNS, table.shape[2])
    program: Any = decode_tile[(-(-codes.shape[0] // DECODED_ROWS), -(-weight.inputs // columns))]
    program(
        codes,
        scales,
        table,
        out,
        codes.stride(0),
        weight.inputs,
        codes.shape[0],
        weight.inputs // table.shape[2],
        codes.shape[1],
        STAGES=table.shape[0],
        BITS=weight.code_bits,
        WIDTH=table.shape[2],
        ROWS=DECODED_ROWS,
        COLUMNS=columns,
    )
    return out


def parts_of(weight: Weight, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Codes with contiguous rows, the scales, and the table of codewords in `dtype`."""
    codes = weight.codes if weight.codes.stride(1) == 1 else weight.codes.contiguous()
    return codes, weight.row_scale.detach().contiguous(), weight.table(dtype)
