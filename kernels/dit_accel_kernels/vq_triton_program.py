"""The Triton programs of vq_linear. Imports triton, so only vq_triton_kernel.py imports it, at first use."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decoded_tile(
    codes,
    codes_row,
    table,
    rows,
    row_kept,
    first,
    per_stage,
    length,
    STAGES: tl.constexpr,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Entries [rows, COLUMNS] of the weight from column `first` on, a multiple of WIDTH, without the scales: float32.

    Zero where nothing is kept. A code is read once for its WIDTH entries, which lie side by side in the table; it
    starts in byte j * BITS // 8 of its row and ends in the next one at the latest.
    """
    ENTRIES: tl.constexpr = 2**BITS
    place = first // WIDTH + tl.arange(0, COLUMNS // WIDTH)
    kept = row_kept[:, None] & (place < per_stage)[None, :]
    values = tl.zeros([rows.shape[0], COLUMNS // WIDTH, WIDTH], tl.float32)
    for stage in tl.static_range(STAGES):  # type: ignore[reportGeneralTypeIssues]
        bit = (stage * per_stage + place) * BITS
        at = codes + rows.to(tl.int64)[:, None] * codes_row + (bit // 8)[None, :]
        word = tl.load(at, mask=kept, other=0).to(tl.int32)
        if BITS != 8:
            second = kept & ((bit // 8 + 1) < length)[None, :]
            word |= tl.load(at + 1, mask=second, other=0).to(tl.int32) << 8
        code = (word >> (bit % 8)[None, :]) & (ENTRIES - 1)
        entry = (stage * ENTRIES + code)[:, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
        values += tl.load(table + entry, mask=kept[:, :, None], other=0.0).to(tl.float32)
    return tl.reshape(values, [rows.shape[0], COLUMNS])


@triton.jit
def multiply_tile(
    x,
    codes,
    row_scale,
    table,
    added,
    bias,
    out,
    x_token,
    codes_row,
    tokens,
    inputs,
    outputs,
    per_stage,
    length,
    STAGES: tl.constexpr,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    ADDED: tl.constexpr,
    BIASED: tl.constexpr,
    UPCAST: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """ROWS x TOKENS entries of out^T [outputs, tokens] = row_scale * W x^T + added^T + bias, decoded on the way.

    x [tokens, inputs] is in rotated inputs; `added` and `out` [tokens, outputs] are contiguous. UPCAST: products in
    float32.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    token_kept = token < tokens
    row_kept = row < outputs
    sums = tl.zeros([ROWS, TOKENS], tl.float32)
    for start in range(0, inputs, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        x_at = x + token.to(tl.int64)[None, :] * x_token + column[:, None]
        part = tl.load(x_at, mask=(column < inputs)[:, None] & token_kept[None, :], other=0.0)
        weight = decoded_tile(
            codes, codes_row, table, row, row_kept, start, per_stage, length, STAGES, BITS, WIDTH, COLUMNS
        )
        if UPCAST:
            part = part.to(tl.float32)
        sums = tl.dot(weight.to(part.dtype), part, sums, input_precision="ieee")
    sums *= tl.load(row_scale + row, mask=row_kept, other=0.0).to(tl.float32)[:, None]
    if BIASED:
        sums += tl.load(bias + row, mask=row_kept, other=0.0).to(tl.float32)[:, None]
    place = token.to(tl.int64)[None, :] * outputs + row[:, None]
    kept = row_kept[:, None] & token_kept[None, :]
    if ADDED:
        sums += tl.load(added + place, mask=kept, other=0.0).to(tl.float32)
    tl.store(out + place, sums.to(out.dtype.element_ty), mask=kept)


@triton.jit
def decode_tile(
    codes,
    row_scale,
    table,
    out,
    codes_row,
    inputs,
    outputs,
    per_stage,
    length,
    STAGES: tl.constexpr,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """ROWS x COLUMNS entries of the weight, scaled -> out [outputs, inputs], contiguous."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLUMNS
    row_kept = row < outputs
    values = decoded_tile(
        codes, codes_row, table, row, row_kept, first, per_stage, length, STAGES, BITS, WIDTH, COLUMNS
    )
    values *= tl.load(row_scale + row, mask=row_kept, other=0.0).to(tl.float32)[:, None]
    column = first + tl.arange(0, COLUMNS)
    place = row.to(tl.int64)[:, None] * inputs + column[None, :]
    tl.store(out + place, values.to(out.dtype.element_ty), mask=row_kept[:, None] & (column < inputs)[None, :])


@triton.jit
def hadamard(SIZE: tl.constexpr):
    """Sylvester's Hadamard matrix, not normalised: float32 [SIZE, SIZE] of 1 and -1."""
    index = tl.arange(0, SIZE)
    bits = index[:, None] & index[None, :]  # an odd number of common bits is -1
    bits = bits ^ (bits >> 8)
    bits = bits ^ (bits >> 4)
    bits = bits ^ (bits >> 2)
    bits = bits ^ (bits >> 1)
    return 1.0 - 2.0 * (bits & 1).to(tl.float32)


@triton.jit
def rotate_tile(
    x,
    signs,
    out,
    x_token,
    tokens,
    inputs,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    TOKENS: tl.constexpr,
    BACK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One Hadamard block, LEFT * RIGHT inputs, of TOKENS rows of x [tokens, inputs] -> out, contiguous.

    H of LEFT * RIGHT is H of LEFT (x) H of RIGHT: two products with matrices that are made here, so x is read and
    written once. Signs come before them, or after with BACK, which makes it the inverse. LEFT 1: one product. UPCAST:
    products in float32.
    """
    BLOCK: tl.constexpr = LEFT * RIGHT
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    kept = (token < tokens)[:, None] & (column < inputs)[None, :]
    values = tl.load(x + token.to(tl.int64)[:, None] * x_token + column[None, :], mask=kept, other=0.0)
    kind = tl.float32 if UPCAST else values.dtype
    values = values.to(tl.float32)
    bit = (tl.load(signs + column // 8, mask=column < inputs, other=0).to(tl.int32) >> (column % 8)) & 1
    sign = (1 - 2 * bit).to(tl.float32)[None, :]
    if not BACK:
        values = values * sign
    rows = tl.reshape(values, [TOKENS * LEFT, RIGHT]).to(kind)
    turned = tl.dot(rows, hadamard(RIGHT).to(kind), input_precision="ieee") * (RIGHT**-0.5)
    if LEFT > 1:
        turned = tl.permute(tl.reshape(turned.to(kind), [TOKENS, LEFT, RIGHT]), [0, 2, 1])
        rows = tl.reshape(turned, [TOKENS * RIGHT, LEFT])
        turned = tl.dot(rows, hadamard(LEFT).to(kind), input_precision="ieee") * (LEFT**-0.5)
        turned = tl.permute(tl.reshape(turned, [TOKENS, RIGHT, LEFT]), [0, 2, 1])
    result = tl.reshape(turned, [TOKENS, BLOCK])
    if BACK:
        result = result * sign
    out_at = out + token.to(tl.int64)[:, None] * inputs + column[None, :]
    tl.store(out_at, result.to(out.dtype.element_ty), mask=kept)
