"""Block-sparse attention by a Triton program, for CUDA. Sizes of tiles were chosen on an H200 (docs/gpu.md).

The interpreter runs it on CPU tensors where TRITON_INTERPRET=1 was set before triton was imported. Its bfloat16 product
is wrong (triton 3.9.0), so there products are taken in float32.
"""

from __future__ import annotations

import importlib.util
import math
import os
from typing import Any

import torch
from torch import Tensor

from dit_accel_kernels.mask import BlockMask

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WARPS = 4  # of a program


def interpreted() -> bool:
    """True where Triton was asked to interpret its programs on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable(q: Tensor) -> str | None:
    """Why the kernel cannot take q, in words; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if q.device.type != "cuda" and not (interpreted() and q.device.type == "cpu"):
        return f"q is on {q.device}, and Triton needs a CUDA device (or TRITON_INTERPRET=1 in the environment)"
    if q.dtype not in DTYPES:
        return f"q is {q.dtype}, and the kernel takes float32, bfloat16 and float16"
    return None


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    scale: float,
    key_bias: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Out [B, H, S_q, D] and LSE [B, H, S_q] float32 or None; no gradient.

    q: [B, H, S_q, D]; k, v: [B, H, S_k, D]; key_bias: float32 [B, H, S_k] or None. float32 products are not rounded to
    TF32.
    """
    from dit_accel_kernels.triton_program import attend_tile

    if scale <= 0:  # the program takes positive ones
        q, scale = (-q, -scale) if scale else (q * 0, 1.0)
    q, k, v = (x.detach() if x.stride(-1) == 1 else x.detach().contiguous() for x in (q, k, v))
    batch, heads, query_tokens, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    dim_padded = max(16, 1 << (dim - 1).bit_length())
    rows, keys = tile_sizes(mask, dim_padded, q.element_size())
    n_q = mask.shape[2]
    columns = mask.columns if len(mask.columns) else mask.columns.new_zeros(1)
    program: Any = attend_tile[(-(-query_tokens // rows), batch * heads)]
    program(
        q,
        k,
        v,
        key_bias if key_bias is not None else lse,
        mask.row_pointers,
        columns,
        out,
        lse,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *(key_bias.stride() if key_bias is not None else (0, 0, 0)),
        mask.shape[1] * n_q if mask.shape[0] > 1 else 0,
        n_q if mask.shape[1] > 1 else 0,
        heads,
        query_tokens,
        k.shape[2],
        scale / math.log(2),
        DIM=dim,
        DIM_PADDED=dim_padded,
        BLOCK_Q=mask.block_q,
        BLOCK_K=mask.block_k,
        ROWS=rows,
        KEYS=keys,
        BIASED=key_bias is not None,
        RAGGED=k.shape[2] % mask.block_k != 0,
        UPCAST=interpreted() and q.dtype == torch.bfloat16,
        num_warps=WARPS,
        num_stages=stages(keys, dim_padded, q),
    )
    return out, lse if return_lse else None


def tile_sizes(mask: BlockMask, dim_padded: int, element_size: int) -> tuple[int, int]:
    """Queries and keys of one product: powers of two that divide the blocks, and fit 99 KiB of shared memory."""
    token_bytes = dim_padded * element_size
    rows, keys = (size & -size for size in (mask.block_q, mask.block_k))  # the largest power of two that divides
    return min(rows, 64, max(16, (32 << 10) // token_bytes)), min(keys, 64, max(16, (16 << 10) // token_bytes))


def stages(keys: int, dim_padded: int, q: Tensor) -> int:
    """Parts of keys and values that are in shared memory at once: 3 where there is room (data centres' GPUs), or 2."""
    if q.device.type != "cuda":
        return 2
    room = torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin
    return 3 if (6 * keys + 64) * dim_padded * q.element_size() <= room else 2
