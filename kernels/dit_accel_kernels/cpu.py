"""Block-sparse attention by the C++ kernel in csrc/, called through ctypes with the tensors' own memory."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from dit_accel_kernels import build
from dit_accel_kernels.mask import BlockMask

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
OUT_OF_MEMORY, HOLDS_NAN = 1, 3  # what the library returns; 0: all went well
POINTERS = ("q", "k", "v", "out", "lse", "bias", "row_pointers", "columns")
STRIDES = ("q_strides", "k_strides", "v_strides", "out_strides", "bias_strides")
SIZES = ("batch", "heads", "query_tokens", "key_tokens", "dim", "mask_batch", "mask_heads", "block_q", "block_k")


class Arguments(ctypes.Structure):
    """`struct Arguments` of csrc/block_sparse_attention.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64 * 3) for name in STRIDES),
        *((name, ctypes.c_int64) for name in SIZES),
        ("type", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("scale", ctypes.c_double),
    )


def unavailable(q: Tensor) -> str | None:
    """Why the kernel cannot take q, in words; None if it can. Compiles it at the first call."""
    if q.device.type != "cpu":
        return f"q is on {q.device}, and the kernel runs on the CPU"
    if q.dtype not in TYPES:
        return f"q is {q.dtype}, and the kernel takes float32, bfloat16 and float16"
    library = build.load()
    return library if isinstance(library, str) else None


def cpu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    scale: float,
    key_bias: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None, bool]:
    """Out [B, H, S_q, D], in memory laid out as q is, LSE [B, H, S_q] float32 or None, and whether out holds NaN.

    q: [B, H, S_q, D]; k, v: [B, H, S_k, D]; key_bias: float32 [B, H, S_k] or None. Has no gradient. Runs on
    `torch.get_num_threads()` threads.
    """
    q, k, v = (x.detach() if x.stride(-1) == 1 or x.shape[-1] == 1 else x.detach().contiguous() for x in (q, k, v))
    out = torch.empty_like(q)  # keeps the order of the strides: [B, S, H, D] in memory stays so
    lse = torch.empty(q.shape[:3], dtype=torch.float32) if return_lse else None
    columns = mask.columns if len(mask.columns) else mask.columns.new_zeros(1)
    library = build.load()
    assert isinstance(library, ctypes.CDLL)
    arguments = Arguments(
        *(x.data_ptr() if x is not None else None for x in (q, k, v, out, lse, key_bias, mask.row_pointers, columns)),
        *((ctypes.c_int64 * 3)(*x.stride()[:3]) for x in (q, k, v, out)),
        (ctypes.c_int64 * 3)(*(key_bias.stride() if key_bias is not None else (0, 0, 0))),
        *q.shape[:3],
        k.shape[2],
        q.shape[3],
        *mask.shape[:2],
        mask.block_q,
        mask.block_k,
        TYPES[q.dtype],
        torch.get_num_threads(),
        scale,
    )
    code = library.dit_accel_block_sparse_attention(ctypes.byref(arguments))
    if code == OUT_OF_MEMORY:
        raise MemoryError("Block-sparse attention could not allocate room for one packed head of keys and values.")
    return out, lse, code == HOLDS_NAN
