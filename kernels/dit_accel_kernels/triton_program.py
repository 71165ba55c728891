"""The Triton program of block-sparse attention. Imports triton, so only triton_kernel.py imports it, at first use."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend_tile(
    q,
    k,
    v,
    bias,
    row_pointers,
    columns,
    out,
    lse,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    bias_batch,
    bias_head,
    bias_token,
    mask_batch,
    mask_head,
    heads,
    query_tokens,
    key_tokens,
    scale,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BIASED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of ROWS queries of one head against the KEYS-wide parts of the key blocks that its list keeps.

    Arguments named x_batch, x_head, x_token are strides in elements; mask strides count rows of the CSR lists.
    `out` [B, H, S_q, D] and `lse` [B, H, S_q] are contiguous. UPCAST: products in float32.
    """
    tile = tl.program_id(0)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    rows = tile * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, DIM_PADDED)
    row_kept = rows < query_tokens
    dim_kept = dims < DIM

    q_at = q + batch * q_batch + head * q_head + rows.to(tl.int64)[:, None] * q_token + dims[None, :]
    queries = tl.load(q_at, mask=row_kept[:, None] & dim_kept[None, :], other=0.0)
    if UPCAST:
        queries = queries.to(tl.float32)
    k_head_at = k + batch * k_batch + head * k_head
    v_head_at = v + batch * v_batch + head * v_head
    bias_head_at = bias + batch * bias_batch + head * bias_head

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, DIM_PADDED], tl.float32)
    row = row_pointers + batch * mask_batch + head * mask_head + tile * ROWS // BLOCK_Q
    parts: tl.constexpr = BLOCK_K // KEYS
    for part in range(tl.load(row) * parts, tl.load(row + 1) * parts):
        block = part // parts
        first = (tl.load(columns + block) - block) * BLOCK_K + part * KEYS
        keys = first + tl.arange(0, KEYS)
        key_kept = keys < key_tokens
        k_at = k_head_at + keys.to(tl.int64)[None, :] * k_token + dims[:, None]
        v_at = v_head_at + keys.to(tl.int64)[:, None] * v_token + dims[None, :]
        key = tl.load(k_at, mask=key_kept[None, :] & dim_kept[:, None], other=0.0)
        value = tl.load(v_at, mask=key_kept[:, None] & dim_kept[None, :], other=0.0)
        if UPCAST:
            key = key.to(tl.float32)
            value = value.to(tl.float32)
        scores = tl.dot(queries, key, input_precision="ieee") * (scale * 1.4426950408889634)  # softmax in base 2
        if BIASED:
            added = tl.load(bias_head_at + keys * bias_token, mask=key_kept, other=0.0)
            lowest = tl.where(added == float("-inf"), float("-inf"), -1e38)  # finite stays finite in base 2
            scores += tl.maximum(added * 1.4426950408889634, lowest)[None, :]
        scores = tl.where(key_kept[None, :], scores, float("-inf"))
        top = tl.maximum(maximum, tl.max(scores, 1))
        zero = tl.where(top == float("-inf"), 0.0, top)  # no key so far: all scores are -inf and give 0
        decay = tl.exp2(maximum - zero)
        weights = tl.exp2(scores - zero[:, None])
        total = total * decay + tl.sum(weights, 1)
        sums = sums * decay[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        maximum = top

    alive = total != 0.0
    result = sums / tl.where(alive, total, 1.0)[:, None]
    natural = tl.where(alive, (maximum + tl.log2(tl.where(alive, total, 1.0))) * 0.6931471805599453, float("-inf"))
    rows_out = (batch * heads + head) * query_tokens + rows.to(tl.int64)
    out_at = out + rows_out[:, None] * DIM + dims[None, :]
    tl.store(out_at, result.to(out.dtype.element_ty), mask=row_kept[:, None] & dim_kept[None, :])
    tl.store(lse + rows_out, natural, mask=row_kept)
