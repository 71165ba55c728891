"""Block-sparse attention written down plainly: all scores, a mask, a softmax. Slow; defines the result."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel_kernels.mask import BlockMask


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, key_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Out [B, H, S_q, D] in q's dtype and LSE [B, H, S_q] float32 (float64 for float64 inputs); differentiable.

    q: [B, H, S_q, D]; k, v: [B, H, S_k, D]; key_bias: [B, H, S_k] or None. Computes in float32, or in float64 if q is.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(dtype) @ k.to(dtype).transpose(-1, -2) * scale  # [B, H, S_q, S_k]
    if key_bias is not None:
        scores = scores + key_bias.to(dtype).unsqueeze(-2)
    scores = scores.masked_fill(~token_mask(mask, q.shape[-2], k.shape[-2]), float("-inf"))
    dead = (scores == float("-inf")).all(-1, keepdim=True)
    scores = scores.masked_fill(dead, 0.0)
    lse = scores.logsumexp(-1, keepdim=True)
    weights = scores.softmax(-1).masked_fill(dead, 0.0)
    out = weights @ v.to(dtype)
    return out.to(q.dtype), lse.masked_fill(dead, float("-inf")).squeeze(-1)


def token_mask(mask: BlockMask, query_tokens: int, key_tokens: int) -> Tensor:
    """The mask by token, bool [B, H, S_q, S_k] with the mask's own B and H."""
    rows = torch.arange(query_tokens, device=mask.device) // mask.block_q
    columns = torch.arange(key_tokens, device=mask.device) // mask.block_k
    return mask.to_dense()[:, :, rows][:, :, :, columns]
