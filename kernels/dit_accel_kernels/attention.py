"""block_sparse_attention: checks its arguments, picks the implementation that is fastest here, and calls it."""

from __future__ import annotations

import warnings
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel_kernels import cpu, triton_kernel
from dit_accel_kernels.errors import KernelError, KernelUnavailableError
from dit_accel_kernels.gather import gather_attention
from dit_accel_kernels.mask import BlockMask
from dit_accel_kernels.reference import reference_attention
from dit_accel_kernels.validation import (
    check_mask,
    check_scale,
    check_tensors,
    checked_bias,
    holds_nan,
    narrow_bias,
    refuse_nan,
)

IMPLEMENTATIONS = ("auto", "dense", "cpu", "gather", "triton", "reference")
GATHER_WINS_BELOW = 0.3  # density; measured, see kernels/benchmarks/results

warned: set[str] = set()  # reasons for slow fallbacks that were told already, each once per process


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    return_lse: Literal[False] = False,
    impl: str = "auto",
) -> Tensor: ...


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    return_lse: Literal[True],
    impl: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each query block over the key blocks that `mask` keeps for it.

    Args:
        q: [B, H, S_q, D], D from 1 to 512; float32, bfloat16 or float16 (float64 in plain PyTorch).
        k, v: [B, H, S_k, D]. Views whose last dimension is contiguous are read in place.
        mask: for [B or 1, H or 1, ceil(S_q / block_q), ceil(S_k / block_k)].
        scale: factor of the scores; 1 / sqrt(D) by default.
        key_bias: added to the scores of each key, broadcast to [B, H, S_k], or [B, S_k]; may be -inf; or bool,
            where False hides a key.
        return_lse: also return log sum exp of each query's scores (natural log), to merge partial results.
        impl: "auto", or one by name. "cpu": own C++ kernel, compiled at first use. "triton": CUDA. "gather": PyTorch,
            differentiable. "reference": plain and slow, differentiable. "dense": for a full mask only.

    Returns:
        Out [B, H, S_q, D] in q's dtype, and with `return_lse` also LSE float32 [B, H, S_q]. A query with no key left
        gets 0 and -inf.

    Raises:
        KernelError: an argument is not allowed, or an input holds NaN that reached the result (looked for on the CPU).
        KernelUnavailableError: `impl` was asked for by name and cannot run here.
    """
    check_tensors(q, k, v)
    check_mask(q, k, mask)
    factor = check_scale(scale, q)
    bias = checked_bias(key_bias, k)
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, bias))
    chosen = choose(q, mask.density, impl, differentiable)
    if chosen == "dense" and not mask.is_full:
        if impl == "dense":
            raise KernelError(
                f"impl='dense' ignores the mask, which keeps {mask.density:.0%}; use impl='auto' or a full mask."
            )
        warn_slow(q, mask.density, differentiable)
        chosen = "gather"
    if chosen == "cpu":
        out, lse, nan = cpu.cpu_attention(q, k, v, mask, factor, bias, return_lse)
    else:
        out, lse = run(chosen, q, k, v, mask, scale, factor, bias, return_lse)
        nan = q.device.type != "cuda" and (holds_nan(out) or holds_nan(lse))  # on CUDA reading it would wait
    if nan:
        refuse_nan({"q": q, "k": k, "v": v, "key_bias": key_bias})
    if not return_lse:
        return out
    assert lse is not None
    return out, lse.float()


def choose_implementation(q: Tensor, density: float, impl: str = "auto") -> str:
    """What `impl` means for q [B, H, S, D] and a mask of `density`: "dense", "cpu", "gather" or "triton".

    "dense" below density 1 says that nothing here beats `F.scaled_dot_product_attention`, so a caller that may drop the
    mask should; `block_sparse_attention` itself keeps to the mask and warns. May compile the CPU kernel.
    """
    return choose(q, density, impl, torch.is_grad_enabled() and q.requires_grad)


def choose(q: Tensor, density: float, impl: str, differentiable: bool) -> str:
    """The implementation that `impl` means; raises where one was named that cannot do it."""
    if impl not in IMPLEMENTATIONS:
        raise KernelError(f"impl is {impl!r}, but it must be one of {', '.join(IMPLEMENTATIONS)}.")
    if impl in ("cpu", "triton"):
        if differentiable:
            raise KernelError(
                f"impl={impl!r} has no gradient, but an input requires one; use impl='gather' or torch.no_grad()."
            )
        reason = cpu.unavailable(q) if impl == "cpu" else triton_kernel.unavailable(q)
        if reason:
            raise KernelUnavailableError(f"impl={impl!r} cannot run here: {reason}; use impl='auto'.")
    if impl != "auto":
        return impl
    if density == 1.0:
        return "dense"
    if not differentiable:
        if q.device.type == "cpu" and not cpu.unavailable(q):
            return "cpu"
        if q.device.type == "cuda" and not triton_kernel.unavailable(q):
            return "triton"
    return "gather" if density < GATHER_WINS_BELOW else "dense"


def warn_slow(q: Tensor, density: float, differentiable: bool) -> None:
    """Say once for each reason that dense attention would be faster than the fallback."""
    if differentiable:
        reason = "gradients are required, which the fast kernels do not have"
    else:
        reason = cpu.unavailable(q) if q.device.type == "cpu" else triton_kernel.unavailable(q)
    if reason in warned:
        return
    warned.add(str(reason))
    warnings.warn(
        f"Block-sparse attention at density {density:.2f} runs by gathering, slower than dense attention, "
        f"because {reason}; a density below {GATHER_WINS_BELOW} would be faster.",
        stacklevel=3,
    )


def run(
    chosen: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    scale: float | None,
    factor: float,
    bias: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Call one implementation in Python; `factor` is `scale` with its default filled in."""
    if chosen == "dense":
        return dense_attention(q, k, v, scale, bias, return_lse)
    if chosen == "triton":
        return triton_kernel.triton_attention(q, k, v, mask, factor, bias, return_lse)
    if chosen == "gather":
        return gather_attention(q, k, v, mask, factor, bias, return_lse)
    return reference_attention(q, k, v, mask, factor, bias)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, bias: Tensor | None, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """`F.scaled_dot_product_attention`, bit for bit; LSE [B, H, S_q] costs a second pass over the scores."""
    attn_mask = narrow_bias(bias, q.dtype).unsqueeze(-2) if bias is not None else None
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, scale=scale)
    dead = (bias == float("-inf")).all(-1)[..., None] if bias is not None else None  # [B, H, 1]
    if dead is not None:
        out = out.masked_fill(dead[..., None], 0.0)
    return out, dense_lse(q, k, scale, bias, dead) if return_lse else None


def dense_lse(q: Tensor, k: Tensor, scale: float | None, bias: Tensor | None, dead: Tensor | None) -> Tensor:
    """LSE [B, H, S_q] in chunks of query rows, so that no full score matrix is kept."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    keys = k.to(dtype).transpose(-1, -2)
    rows = max(1, (32 << 20) // (4 * q.shape[0] * q.shape[1] * k.shape[-2]))
    parts = []
    for part in (q.to(dtype) * check_scale(scale, q)).split(rows, dim=-2):
        scores = part @ keys
        parts.append((scores + bias.unsqueeze(-2) if bias is not None else scores).logsumexp(-1))
    lse = torch.cat(parts, dim=-1)
    return lse.masked_fill(dead, float("-inf")) if dead is not None else lse
