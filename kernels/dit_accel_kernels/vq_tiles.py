"""Products with a vector-quantised weight tile by tile: rows are decoded into a scratch buffer and multiplied there.

For whatever the C++ kernel does not do by itself: other devices, float64, machines without a compiler, the gradient.
`way` says what decodes and rotates: "cpu" the C++ kernel, "triton" Triton programs, "torch" torch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dit_accel_kernels import vq_cpu, vq_plain, vq_triton_kernel
from dit_accel_kernels.vq_plain import Weight
from dit_accel_kernels.vq_scratch import scratch

TILE_BYTES = {"cpu": 4 << 20, "cuda": 32 << 20}  # of one decoded tile at the most
ALIGNED = 128  # rows that a tile is a multiple of, where it has more


def product(x: Tensor, weight: Weight, bias: Tensor | None, limit: int, way: str) -> Tensor:
    """x [T, I] -> [T, O] in x's dtype; memory beside it: x in rotated inputs, and `limit` bytes if one row fits in."""
    turned = _rotate(x, weight, way)
    out = x.new_empty(x.shape[0], weight.outputs)
    low = turned @ weight.low_rank[0].detach().to(x.dtype).T if weight.low_rank else None
    for rows, tile in tiles(weight, x.dtype, limit, way):
        part, added = out[:, rows], bias[rows].detach().to(x.dtype) if bias is not None else None
        if low is not None:
            assert weight.low_rank is not None
            second = weight.low_rank[1][rows].detach().to(x.dtype).T
            part = torch.mm(low, second, out=part) if added is None else torch.addmm(added, low, second, out=part)
            part.addmm_(turned, tile.T)
        elif added is None:
            torch.mm(turned, tile.T, out=part)
        else:
            torch.addmm(added, turned, tile.T, out=part)
    return out


def input_gradient(gradient: Tensor, weight: Weight, limit: int, way: str) -> Tensor:
    """gradient [T, O] of the result -> [T, I] of x, the memory as in `product`."""
    turned = gradient.new_zeros(gradient.shape[0], weight.inputs)
    for rows, tile in tiles(weight, gradient.dtype, limit, way):
        turned.addmm_(gradient[:, rows], tile)
    if weight.low_rank is not None:
        first, second = (part.detach().to(gradient.dtype) for part in weight.low_rank)
        turned.addmm_(gradient @ second, first)
    return _rotate(turned, weight, way, back=True)


def _rotate(x: Tensor, weight: Weight, way: str, back: bool = False) -> Tensor:
    """x [T, I] in rotated inputs, or with `back` in plain ones."""
    if way == "torch":
        return (vq_plain.unrotate if back else vq_plain.rotate)(x, weight.signs, weight.block)
    return (vq_cpu if way == "cpu" else vq_triton_kernel).rotate(x, weight, back=back)


def rows_of(weight: Weight, dtype: torch.dtype, limit: int, way: str) -> int:
    """How many rows of the weight are decoded at once, all of them where they fit."""
    beside = vq_plain.decode_bytes(weight, dtype.itemsize) if way == "torch" else 0
    most = min(limit, TILE_BYTES.get(weight.codes.device.type, TILE_BYTES["cuda"]))
    count = max(1, most // (weight.inputs * dtype.itemsize + beside))
    if count > ALIGNED:  # a product over an odd number of rows takes cuBLAS nine times as long
        count -= count % ALIGNED
    return min(weight.outputs, count)


def tiles(weight: Weight, dtype: torch.dtype, limit: int, way: str) -> Iterator[tuple[slice, Tensor]]:
    """Yields (rows, decoded rows [rows, I]) in turn, all in the same memory."""
    device, row_bytes = weight.codes.device, weight.inputs * dtype.itemsize
    table = weight.table(torch.float32 if way == "cpu" else dtype)
    count = rows_of(weight, dtype, limit, way)
    decode = {"cpu": vq_cpu, "torch": vq_plain, "triton": vq_triton_kernel}[way].decode_into
    buffer = scratch(device, count * row_bytes).view(dtype).view(count, weight.inputs)
    for first in range(0, weight.outputs, count):
        rows = slice(first, min(first + count, weight.outputs))
        yield rows, decode(weight, table, rows, buffer[: rows.stop - first])
