"""A vector-quantised weight in the C++ kernel of csrc/: called through ctypes, with the tensors' own memory."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from dit_accel_kernels import build
from dit_accel_kernels.vq_plain import Weight
from dit_accel_kernels.vq_scratch import scratch

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FORWARD, DECODE, ROTATE, UNROTATE = range(4)  # tasks of the library
POINTERS = ("x", "out", "codes", "row_scale", "table", "signs", "low_a", "low_b", "bias", "scratch")
NUMBERS = ("scratch_floats", "x_stride", "out_stride", "codes_stride")
SIZES = ("tokens", "inputs", "outputs", "width", "stages", "bits", "block", "rank")


class Arguments(ctypes.Structure):
    """`struct Arguments` of csrc/vq_linear.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in (*NUMBERS, *SIZES)),
        ("type", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


def unavailable(x: Tensor) -> str | None:
    """Why the kernel cannot take x, in words; None if it can. Compiles it at the first call."""
    if x.device.type != "cpu":
        return f"x is on {x.device}, and the kernel runs on the CPU"
    if x.dtype not in TYPES:
        return f"x is {x.dtype}, and the kernel takes float32, bfloat16 and float16"
    library = build.load(build.VQ_SOURCE)
    return library if isinstance(library, str) else None


def product(x: Tensor, weight: Weight, bias: Tensor | None, limit: int) -> Tensor:
    """x [T, I] -> [T, O] in x's dtype; memory beside it: a scratch of at most `limit` bytes, if one panel fits in.

    Runs on `torch.get_num_threads()` threads.
    """
    x = x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
    out = x.new_empty(x.shape[0], weight.outputs)
    if x.shape[0]:
        run(FORWARD, x, out, weight, bias=bias, limit=limit)
    return out


def decode_into(weight: Weight, table: Tensor, rows: slice, out: Tensor) -> Tensor:
    """Rows from codes and scales alone -> `out` [rows, I], overwritten. table: float32 [S, 2 ** code_bits, d]."""
    run(DECODE, None, out, weight, rows=rows, table=table)
    return out


def rotate(x: Tensor, weight: Weight, back: bool = False) -> Tensor:
    """x [T, I] in rotated inputs, or with `back` the way back -> as x, in x's dtype; rounded once."""
    if weight.signs is None or not x.shape[0]:
        return x
    x = x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    run(UNROTATE if back else ROTATE, x, out, weight)
    return out


def run(
    task: int,
    x: Tensor | None,
    out: Tensor,
    weight: Weight,
    *,
    rows: slice = slice(None),
    table: Tensor | None = None,
    bias: Tensor | None = None,
    limit: int = 0,
) -> None:
    """One task of the library on tensors whose last dimension is contiguous."""
    library = build.load(build.VQ_SOURCE)
    assert isinstance(library, ctypes.CDLL)
    codes, scales = weight.codes[rows], floats(weight.row_scale[rows])
    codes = codes if codes.stride(1) == 1 or codes.shape[1] == 1 else codes.contiguous()
    table = weight.table(torch.float32) if table is None else table
    first, second = (floats(part) for part in weight.low_rank) if weight.low_rank else (None, None)
    bias = floats(bias) if bias is not None else None
    signs = weight.signs.contiguous() if weight.signs is not None else None
    arguments = Arguments(
        *(t.data_ptr() if t is not None else None for t in (x, out, codes, scales, table, signs, first, second, bias)),
        None,
        0,
        x.stride(0) if x is not None else 0,
        out.stride(0),
        codes.stride(0),
        x.shape[0] if x is not None else 0,
        weight.inputs,
        scales.shape[0],
        table.shape[2],
        table.shape[0],
        weight.code_bits,
        weight.block,
        len(first) if first is not None else 0,
        TYPES[out.dtype],
        torch.get_num_threads(),
    )
    needed = library.dit_accel_vq_scratch
    needed.restype, needed.argtypes = ctypes.c_int64, (ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)
    arguments.scratch_floats = needed(ctypes.byref(arguments), task, limit // 4)
    # The shared scratch holds the tile that DECODE fills; the other tasks take a few KiB of their own.
    size = 4 * arguments.scratch_floats
    memory = scratch(out.device, size) if task == FORWARD else torch.empty(size, dtype=torch.uint8)
    arguments.scratch = memory.data_ptr()
    library.dit_accel_vq_run(ctypes.byref(arguments), task)


def floats(tensor: Tensor) -> Tensor:
    """As contiguous float32; the tensor itself where it is that."""
    return tensor.detach().float().contiguous()
