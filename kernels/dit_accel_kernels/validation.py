"""Checks of the arguments of `block_sparse_attention`, made once, so that the kernels need none."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dit_accel_kernels.errors import KernelError
from dit_accel_kernels.mask import BlockMask

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LARGEST_HEAD = 512


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q [B, H, S_q, D], k and v [B, H, S_k, D]: one dtype, one device, shapes that fit."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise KernelError(f"{name} is {type(x).__name__}, but it must be a tensor [B, H, S, D].")
        if x.dim() != 4 or x.numel() == 0:
            raise KernelError(f"{name} has shape {list(x.shape)}, but it must be [B, H, S, D], each 1 or more.")
    if k.shape != v.shape:
        raise KernelError(
            f"k is {list(k.shape)} and v is {list(v.shape)}, but both must have one shape [B, H, S_k, D]."
        )
    if q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]:
        raise KernelError(
            f"q is {list(q.shape)} and k is {list(k.shape)}, but B, H and D must agree; "
            "repeat k and v over the heads where heads share them."
        )
    if q.shape[-1] > LARGEST_HEAD:
        raise KernelError(f"The head size D is {q.shape[-1]}, but it must be 1 to {LARGEST_HEAD}; use dense attention.")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise KernelError(
            f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}, but all must have one dtype of float32, bfloat16, float16 "
            "or float64; convert them with .to(q.dtype)."
        )
    if not q.device == k.device == v.device:
        raise KernelError(
            f"q, k, v are on {q.device}, {k.device}, {v.device}, but all must be on one device; use .to()."
        )


def check_mask(q: Tensor, k: Tensor, mask: BlockMask) -> None:
    """The mask's B, H, n_q, n_k and device against those of the tensors."""
    if not isinstance(mask, BlockMask):
        raise KernelError(f"mask is {type(mask).__name__}, but it must be a BlockMask; use BlockMask.from_dense(keep).")
    for place, name in enumerate(("B", "H")):
        if mask.shape[place] not in (1, q.shape[place]):
            raise KernelError(
                f"{name} of the mask is {mask.shape[place]} and of q {q.shape[place]}, but it must be equal, or 1 to "
                "share the mask."
            )
    for name, given, tokens, size in (
        ("n_q", mask.shape[2], q.shape[-2], mask.block_q),
        ("n_k", mask.shape[3], k.shape[-2], mask.block_k),
    ):
        if given != math.ceil(tokens / size):
            raise KernelError(
                f"{name} of the mask is {given}, but {tokens} tokens in blocks of {size} make "
                f"{math.ceil(tokens / size)}; build the mask for these lengths and this block size."
            )
    if mask.device != q.device:
        raise KernelError(f"The mask is on {mask.device} and q on {q.device}; use mask.to(q.device).")


def checked_bias(key_bias: Tensor | None, k: Tensor) -> Tensor | None:
    """`key_bias` as additive floats [B, H, S_k] (a view where it is broadcast); bool False becomes -inf."""
    if key_bias is None:
        return None
    batch, heads, tokens = k.shape[:3]
    shape = tuple(key_bias.shape) if isinstance(key_bias, Tensor) else None
    if isinstance(key_bias, Tensor) and key_bias.dim() == 2:
        key_bias = key_bias.unsqueeze(1)
    if (
        not isinstance(key_bias, Tensor)
        or key_bias.dim() not in (1, 3)
        or any(given not in (1, wanted) for given, wanted in zip(key_bias.shape[::-1], (tokens, heads, batch)))
    ):
        given = type(key_bias).__name__ if shape is None else f"of shape {list(shape)}"
        raise KernelError(
            f"key_bias is {given}, but it must broadcast to [B, H, S_k] = {[batch, heads, tokens]} or be "
            f"[B, S_k] = {[batch, tokens]}; a mask by query is not a key bias."
        )
    if key_bias.device != k.device:
        raise KernelError(f"key_bias is on {key_bias.device} and k on {k.device}; use key_bias.to(k.device).")
    if key_bias.dtype == torch.bool:
        key_bias = torch.zeros_like(key_bias, dtype=torch.float32).masked_fill(~key_bias, float("-inf"))
    elif not key_bias.is_floating_point():
        raise KernelError(f"key_bias is {key_bias.dtype}, but it must be bool (False hides a key) or additive floats.")
    return key_bias.to(torch.float64 if k.dtype == torch.float64 else torch.float32).expand(batch, heads, tokens)


def narrow_bias(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """`bias` in a smaller dtype; finite stays finite, since masks hold the lowest float32 as well as -inf."""
    if dtype == bias.dtype:
        return bias
    return torch.where(bias == float("-inf"), bias, bias.clamp(min=torch.finfo(dtype).min)).to(dtype)


def check_scale(scale: float | None, q: Tensor) -> float:
    """The factor of the scores, 1 / sqrt(D) where None is given."""
    if scale is None:
        return 1.0 / math.sqrt(q.shape[-1])
    if not math.isfinite(scale):
        raise KernelError(f"scale is {scale}, but it must be a finite number; leave it out for 1 / sqrt(D).")
    return float(scale)


def holds_nan(x: Tensor | None) -> bool:
    """True where a result holds NaN; costs one sum in the common case. Infinity alone is passed on, as torch does."""
    if x is None or torch.isfinite(x.detach().sum(dtype=torch.float32)):
        return False
    return bool(x.isnan().any())


def refuse_nan(inputs: dict[str, Tensor | None]) -> None:
    """Raise with the names of the inputs that hold NaN; none does where infinities met."""
    bad = [name for name, x in inputs.items() if x is not None and x.isnan().any()]
    if bad:
        raise KernelError(
            f"NaN in {' and '.join(bad)} reached the result; q, k, v and key_bias must hold numbers. "
            "Look for an overflow before attention, often float16: bfloat16 or float32 has the range."
        )
