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
    columns,
    column_kept,
    per_stage,
    length,
    STAGES: tl.constexpr,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Entries [rows, columns] of the weight, without the scales: float32, zero where nothing is kept.

    A code starts in byte j * BITS // 8 of its row and ends in the next one at the latest.
    """
    ENTRIES: tl.constexpr = 2**BITS
    kept = row_kept[:, None] & column_kept[None, :]
    values = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    for stage in tl.static_range(STAGES):  # type: ignore[reportGeneralTypeIssues]
        bit = (stage * per_stage + columns // WIDTH) * BITS
        at = codes + rows.to(tl.int64)[:, None] * codes_row + (bit // 8)[None, :]
        word = tl.load(at, mask=kept, other=0).to(tl.int32)
        if BITS != 8:
            second = kept & ((bit // 8 + 1) < length)[None, :]
            word |= tl.load(at + 1, mask=second, other=0).to(tl.int32) << 8
        code = (word >> (bit % 8)[None, :]) & (ENTRIES - 1)
        entry = (stage * ENTRIES + code) * WIDTH + (columns % WIDTH)[None, :]
        values += tl.load(table + entry, mask=kept, other=0.0).to(tl.float32)
    return values


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
    """TOKENS x ROWS entries of out [tokens, outputs] = x W^T * row_scale + added + bias; rows are decoded on the way.

    x [tokens, inputs] is in rotated inputs; `added` and `out` are contiguous. UPCAST: products in float32.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    token_kept = token < tokens
    row_kept = row < outputs
    sums = tl.zeros([TOKENS, ROWS], tl.float32)
    for start in range(0, inputs, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        column_kept = column < inputs
        x_at = x + token.to(tl.int64)[:, None] * x_token + column[None, :]
        part = tl.load(x_at, mask=token_kept[:, None] & column_kept[None, :], other=0.0)
        weight = decoded_tile(
            codes, codes_row, table, row, row_kept, column, column_kept, per_stage, length, STAGES, BITS, WIDTH
        )
        if UPCAST:
            part = part.to(tl.float32)
        sums += tl.dot(part, tl.trans(weight.to(part.dtype)), input_precision="ieee")
    sums *= tl.load(row_scale + row, mask=row_kept, other=0.0)[None, :]
    if BIASED:
        sums += tl.load(bias + row, mask=row_kept, other=0.0).to(tl.float32)[None, :]
    place = token.to(tl.int64)[:, None] * outputs + row[None, :]
    kept = token_kept[:, None] & row_kept[None, :]
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
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row_kept = row < outputs
    column_kept = column < inputs
    values = decoded_tile(
        codes, codes_row, table, row, row_kept, column, column_kept, per_stage, length, STAGES, BITS, WIDTH
    )
    values *= tl.load(row_scale + row, mask=row_kept, other=0.0)[:, None]
    place = row.to(tl.int64)[:, None] * inputs + column[None, :]
    tl.store(out + place, values.to(out.dtype.element_ty), mask=row_kept[:, None] & column_kept[None, :])
