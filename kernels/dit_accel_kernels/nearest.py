"""The nearest codeword of each vector: an own C++ kernel on the CPU, chunks of a product and argmin elsewhere."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from dit_accel_kernels import build
from dit_accel_kernels.errors import KernelError, KernelUnavailableError

CHUNK = 2048  # vectors whose scores of every codeword fit a CPU's cache: 4 to 7 times as fast as 32768
SOURCE = build.SOURCE.with_name("nearest_codewords.cpp")
IMPLEMENTATIONS = ("auto", "cpu", "torch")
POINTERS = ("vectors", "codewords", "weights", "found", "scratch")
SIZES = ("count", "entries", "width")


class Arguments(ctypes.Structure):
    """`struct Arguments` of csrc/nearest_codewords.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in SIZES),
        ("threads", ctypes.c_int32),
    )


def nearest_codewords(vectors: Tensor, codewords: Tensor, weights: Tensor | None = None, impl: str = "auto") -> Tensor:
    """Index of the codeword with the smallest |c|^2 / 2 - v . c, or sum w (c^2 / 2 - v c); the first of equals.

    A score of NaN is smaller than any number, as in `argmin`: a vector that holds NaN has codeword 0. Which of two
    codewords wins whose scores differ by less than rounding is up to the implementation. "cpu" gives every vector the
    same codeword wherever it stands and on however many threads.

    Args:
        vectors: [N, d], of floats.
        codewords: [K, d], K and d 1 or more, in the dtype of the vectors.
        weights: [N, d], what a squared error costs in each place; None for 1 everywhere.
        impl: "auto", or one by name. "cpu": own C++ kernel for float32, compiled at first use, on
            `torch.get_num_threads()` threads. "torch": a product and argmin for some vectors at a time, on any device.

    Returns:
        int64 [N], each from 0 to K - 1; has no gradient.

    Raises:
        KernelError: an argument is not allowed.
        KernelUnavailableError: `impl` was asked for by name and cannot run here.
    """
    check(vectors, codewords, weights, impl)
    if impl != "torch":
        reason = unavailable(vectors)
        if reason is None:
            return searched(vectors, codewords, weights)
        if impl == "cpu":
            raise KernelUnavailableError(f'impl="cpu" cannot run: {reason}; use impl="auto".')
    return multiplied(vectors, codewords, weights)


def check(vectors: Tensor, codewords: Tensor, weights: Tensor | None, impl: str) -> None:
    """Shapes, dtypes and devices; never values."""
    if impl not in IMPLEMENTATIONS:
        raise KernelError(f"impl is {impl!r}, but it must be one of {', '.join(IMPLEMENTATIONS)}.")
    for name, tensor, shape in (("vectors", vectors, "[N, d]"), ("codewords", codewords, "[K, d]")):
        if not isinstance(tensor, Tensor) or tensor.dim() != 2:
            given = f"of shape {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise KernelError(f"{name} is {given}, but it must be a tensor {shape}.")
    if not codewords.numel() or codewords.shape[1] != vectors.shape[1]:
        raise KernelError(
            f"codewords has shape {list(codewords.shape)}, but for vectors of shape {list(vectors.shape)} it must be "
            f"[K, {vectors.shape[1] or 'd'}], with K and d 1 or more."
        )
    if not vectors.dtype.is_floating_point:
        raise KernelError(f"vectors is {vectors.dtype}, but it must be of floats; use vectors.float().")
    if weights is not None and (not isinstance(weights, Tensor) or weights.shape != vectors.shape):
        given = f"of shape {list(weights.shape)}" if isinstance(weights, Tensor) else type(weights).__name__
        raise KernelError(f"weights is {given}, but it must be a tensor as vectors, {list(vectors.shape)}, or None.")
    for name, tensor in (("codewords", codewords), ("weights", weights)):
        if tensor is not None and (tensor.dtype != vectors.dtype or tensor.device != vectors.device):
            raise KernelError(
                f"{name} is {tensor.dtype} on {tensor.device} and vectors {vectors.dtype} on {vectors.device}, but "
                "both must be the same; use .to(vectors)."
            )


def unavailable(vectors: Tensor) -> str | None:
    """Why the kernel cannot take these vectors, in words; None if it can. Compiles it at the first call."""
    if vectors.device.type != "cpu":
        return f"vectors is on {vectors.device}, and the kernel runs on the CPU"
    if vectors.dtype != torch.float32:
        return f"vectors is {vectors.dtype}, and the kernel takes float32"
    library = build.load(SOURCE)
    return library if isinstance(library, str) else None


def searched(vectors: Tensor, codewords: Tensor, weights: Tensor | None) -> Tensor:
    """By the kernel -> int64 [N]. vectors, weights: float32 [N, d]. codewords: float32 [K, d]."""
    library = build.load(SOURCE)
    assert isinstance(library, ctypes.CDLL)
    found = torch.empty(len(vectors), dtype=torch.int64)
    vectors, codewords = vectors.detach().contiguous(), codewords.detach().contiguous()
    weights = weights.detach().contiguous() if weights is not None else None
    arguments = Arguments(
        *(t.data_ptr() if t is not None else None for t in (vectors, codewords, weights, found)),
        None,
        len(vectors),
        *codewords.shape,
        torch.get_num_threads(),
    )
    needed = library.dit_accel_nearest_scratch
    needed.restype, needed.argtypes = ctypes.c_int64, (ctypes.c_void_p,)
    scratch = torch.empty(needed(ctypes.byref(arguments)), dtype=torch.float32)
    arguments.scratch = scratch.data_ptr()
    library.dit_accel_nearest_codewords(ctypes.byref(arguments))
    return found


def chunk_of(device: torch.device) -> int:
    """How many vectors are compared with all codewords at once; on a GPU enough to outweigh its launches."""
    return CHUNK if device.type == "cpu" else 32 * CHUNK


def multiplied(vectors: Tensor, codewords: Tensor, weights: Tensor | None) -> Tensor:
    """By products with all codewords, some vectors at a time -> int64 [N]. Arguments as of `nearest_codewords`."""
    found, chunk = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device), chunk_of(vectors.device)
    half = codewords.square() / 2
    if weights is None:
        bias, table = half.sum(1), -codewords.T
        for part, given in zip(found.split(chunk), vectors.split(chunk)):
            part.copy_(torch.addmm(bias, given, table).argmin(1))
        return found
    table = torch.cat([half, -codewords], 1).T
    for part, given, costs in zip(found.split(chunk), vectors.split(chunk), weights.split(chunk)):
        part.copy_((torch.cat([costs, costs * given], 1) @ table).argmin(1))
    return found
