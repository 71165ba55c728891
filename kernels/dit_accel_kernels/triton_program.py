"""The Triton program of block-sparse attention. Imports triton, so only triton_kernel.py imports it, at first use."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend_blocks(
    queries,
    k_at,
    v_at,
    bias_at,
    columns,
    begin,
    end,
    key_tokens,
    k_token,
    v_token,
    bias_token,
    scale,
    maximum,
    total,
    sums,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KEYS: tl.constexpr,
    BIASED: tl.constexpr,
    RAGGED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The running softmax, in base 2, over the key blocks `columns[begin:end]`, KEYS keys at a time.

    k_at, v_at, bias_at: of the first key of all. scale: of the scores, above 0. RAGGED: keys may lie past the last.
    maximum, total [ROWS], sums [ROWS, DIM_PADDED]: of the keys so far, handed back with these.
    """
    parts: tl.constexpr = BLOCK_K // KEYS
    keys = tl.arange(0, KEYS)
    dims = tl.arange(0, DIM_PADDED)
    for part in range(begin * parts, end * parts):
        block = part // parts
        first = tl.load(columns + block) * BLOCK_K + (part - block * parts) * KEYS
        at = first.to(tl.int64)
        key_at = k_at + at * k_token + keys[None, :] * k_token + dims[:, None]
        value_at = v_at + at * v_token + keys[:, None] * v_token + dims[None, :]
        kept = first + keys < key_tokens
        if RAGGED or DIM != DIM_PADDED:
            inside = dims < DIM
            key = tl.load(key_at, mask=kept[None, :] & inside[:, None], other=0.0)
            value = tl.load(value_at, mask=kept[:, None] & inside[None, :], other=0.0)
        else:
            key = tl.load(key_at)
            value = tl.load(value_at)
        if UPCAST:
            key = key.to(tl.float32)
            value = value.to(tl.float32)
        scores = tl.dot(queries, key, input_precision="ieee")
        if BIASED:
            added = tl.load(bias_at + at * bias_token + keys * bias_token, mask=kept, other=0.0)
            lowest = tl.where(added == float("-inf"), float("-inf"), -1e38)  # finite stays finite in base 2
            scores = scores * scale + tl.maximum(added * 1.4426950408889634, lowest)[None, :]
        if RAGGED:
            scores = tl.where(kept[None, :], scores, float("-inf"))
        if BIASED:
            top = tl.maximum(maximum, tl.max(scores, 1))
            zero = tl.where(top == float("-inf"), 0.0, top)  # no key so far: all scores are -inf and give 0
            weights = tl.exp2(scores - zero[:, None])
        else:
            top = tl.maximum(maximum, tl.max(scores, 1) * scale)
            zero = top  # a block has a key at the least
            weights = tl.exp2(scores * scale - zero[:, None])
        decay = tl.exp2(maximum - zero)
        total = total * decay + tl.sum(weights, 1)
        sums = sums * decay[:, None]
        sums = tl.dot(weights.to(value.dtype), value, sums, input_precision="ieee")
        maximum = top
    return maximum, total, sums


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
    RAGGED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of ROWS queries of one head against the KEYS-wide parts of the key blocks that its list keeps.

    Arguments named x_batch, x_head, x_token are strides in elements; mask strides count rows of the CSR lists.
    `out` [B, H, S_q, D] and `lse` [B, H, S_q] are contiguous. scale: of the scores in base 2, above 0. RAGGED: the last
    key block is cut short. UPCAST: products in float32.
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
    begin = tl.load(row)
    end = tl.load(row + 1)
    whole = end
    if RAGGED:
        whole = tl.maximum(end - 1, begin)  # key blocks rise, so only the last one of a row can be cut short
    maximum, total, sums = attend_blocks(
        queries, k_head_at, v_head_at, bias_head_at, columns, begin, whole, key_tokens, k_token, v_token, bias_token,
        scale, maximum, total, sums,
        DIM, DIM_PADDED, BLOCK_K, KEYS, BIASED, False, UPCAST,  # type: ignore[reportArgumentType]
    )  # fmt: skip
    if RAGGED:
        maximum, total, sums = attend_blocks(
            queries, k_head_at, v_head_at, bias_head_at, columns, whole, end, key_tokens, k_token, v_token, bias_token,
            scale, maximum, total, sums,
            DIM, DIM_PADDED, BLOCK_K, KEYS, BIASED, True, UPCAST,  # type: ignore[reportArgumentType]
        )  # fmt: skip

    alive = total != 0.0
    result = sums / tl.where(alive, total, 1.0)[:, None]
    natural = tl.where(alive, (maximum + tl.log2(tl.where(alive, total, 1.0))) * 0.6931471805599453, float("-inf"))
    rows_out = (batch * heads + head) * query_tokens + rows.to(tl.int64)
    out_at = out + rows_out[:, None] * DIM + dims[None, :]
    tl.store(out_at, result.to(out.dtype.element_ty), mask=row_kept[:, None] & dim_kept[None, :])
    tl.store(lse + rows_out, natural, mask=row_kept)
