"""Block-sparse attention in pure PyTorch: gather each query block's keys, then batched dense attention.

The fallback where no compiler is at hand; on a CPU it beats dense attention at high sparsity only, because the kept
keys and values are copied once for each query block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel_kernels.mask import BlockMask
from dit_accel_kernels.validation import narrow_bias

CHUNK_BYTES = 32 << 20  # of gathered keys and values: larger chunks fall out of the caches, smaller ones add calls
PADDING = 7 / 8  # rows share a chunk while the shortest keeps this part of the longest


def gather_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    scale: float,
    key_bias: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Out [B, H, S_q, D] and LSE [B, H, S_q] float32 or None; differentiable.

    q: [B, H, S_q, D]; k, v: [B, H, S_k, D]; key_bias: [B, H, S_k] or None.
    """
    batch, heads, query_tokens, dim = q.shape
    q_blocks, k_blocks, v_blocks = (
        in_blocks(x, size) for x, size in ((q, mask.block_q), (k, mask.block_k), (v, mask.block_k))
    )
    bias_blocks = bias_in_blocks(key_bias, k, mask)
    row_pointers = mask.row_pointers[:-1].view(mask.shape[:3]).expand(batch, heads, -1).reshape(-1).long()
    counts = mask.counts.expand(batch, heads, -1).reshape(-1)
    order = counts.argsort(descending=True, stable=True)
    offsets = torch.arange(batch * heads, device=q.device).repeat_interleave(mask.shape[2]) * mask.shape[3]
    sizes = counts[order].tolist()
    key_bytes = 2 * mask.block_k * dim * q.element_size()

    outs, lses = [], []
    for first, last in chunks(sizes, key_bytes):
        rows, longest = order[first:last], sizes[first]
        if longest == 0:
            outs.append(q_blocks.new_zeros(last - first, mask.block_q, dim))
            lses.append(q.new_full((last - first, mask.block_q), float("-inf"), dtype=torch.float32))
            continue
        steps = torch.arange(longest, device=q.device)
        padded = steps >= counts[rows, None] if sizes[last - 1] < longest else None  # [rows, longest]
        places = row_pointers[rows, None] + steps
        places = places.clamp_(max=len(mask.columns) - 1) if padded is not None else places
        blocks = mask.columns[places] + offsets[rows, None]  # of k_blocks, [rows, longest]
        bias = bias_blocks[blocks] if bias_blocks is not None else None  # [rows, longest, block_k]
        if padded is not None:
            bias = q.new_zeros(1, 1, mask.block_k, dtype=torch.float32) if bias is None else bias
            bias = bias.masked_fill(padded[..., None], float("-inf"))
        keys, values = (x[blocks.reshape(-1)].view(len(rows), -1, dim) for x in (k_blocks, v_blocks))
        bias = bias.reshape(len(rows), 1, -1) if bias is not None else None
        out, lse = attend(q_blocks[rows], keys, values, scale, bias, return_lse)
        outs.append(out)
        lses.append(lse)
    back = order.argsort()
    out = torch.cat(outs)[back].view(batch, heads, -1, dim)[:, :, :query_tokens]
    lse = torch.cat(lses)[back].view(batch, heads, -1)[:, :, :query_tokens].contiguous() if return_lse else None
    return out.contiguous(), lse


def in_blocks(x: Tensor, size: int) -> Tensor:
    """[B, H, S, D] -> [B * H * blocks, size, D], the last block of each head padded with zeros."""
    missing = -x.shape[-2] % size
    x = F.pad(x, (0, 0, 0, missing)) if missing else x
    return x.reshape(-1, size, x.shape[-1])


def bias_in_blocks(key_bias: Tensor | None, k: Tensor, mask: BlockMask) -> Tensor | None:
    """Bias of each key as [B * H * n_k, block_k], -inf where a block is padded; None where there is nothing to add."""
    missing = -k.shape[-2] % mask.block_k
    if key_bias is None and not missing:
        return None
    if key_bias is None:
        key_bias = k.new_zeros(k.shape[:3], dtype=torch.promote_types(k.dtype, torch.float32))
    return F.pad(key_bias.expand(k.shape[:3]), (0, missing), value=float("-inf")).reshape(-1, mask.block_k)


def chunks(sizes: list[int], key_bytes: int) -> Iterator[tuple[int, int]]:
    """(first, last) of runs of rows, longest first, that are attended to in one call."""
    first = 0
    while first < len(sizes):
        rows = max(1, CHUNK_BYTES // max(1, sizes[first] * key_bytes))
        last = first + 1
        while last < len(sizes) and last - first < rows and sizes[last] >= max(1, sizes[first] * PADDING):
            last += 1
        if sizes[first] == 0:
            last = len(sizes)
        yield first, last
        first = last


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Dense attention of q [R, S_q, D] over k, v [R, S_k, D] with a bias [R, 1, S_k]; LSE [R, S_q] if asked for."""
    dead = None
    if bias is not None:
        dead = (bias == float("-inf")).all(-1, keepdim=True)  # [R, 1, 1]
        bias = bias.masked_fill(dead, 0.0)
    if return_lse:
        dtype = torch.promote_types(q.dtype, torch.float32)
        scores = q.to(dtype) @ k.to(dtype).transpose(-1, -2) * scale
        scores = scores + bias.to(dtype) if bias is not None else scores
        lse = scores.logsumexp(-1, keepdim=True)
        out = (scores.softmax(-1) @ v.to(dtype)).to(q.dtype)
        lse = lse.masked_fill(dead, float("-inf")) if dead is not None else lse
        lse = lse.squeeze(-1).float()
    else:
        attn_mask = narrow_bias(bias, q.dtype).expand(-1, q.shape[1], -1).unsqueeze(0) if bias is not None else None
        out = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=attn_mask, scale=scale)[0]
        lse = None
    return out.masked_fill(dead, 0.0) if dead is not None else out, lse
