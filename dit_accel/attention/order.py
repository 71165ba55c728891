"""Order: the sequences in which the tokens of a picture or video can be told, so that near tokens share a block.

raster: frames, rows, columns. tile: tile by tile, raster inside each; the tiles at the far ends may be ragged.
hilbert: a generalised Hilbert curve (the idea: J. Cerveny, "gilbert") through a box of any size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dit_accel.attention.block_sparse import ORDERS
from dit_accel.errors import PolicyError, nearest

Box = tuple[int, int, int]  # frames, height, width
Axis = tuple[int, int]  # which of the three axes, and how far it is walked: negative walks backwards
Point = tuple[int, int, int]


def order_of(size: Box, order: str, tile: Box = (4, 4, 4)) -> Tensor:
    """Raster index of each token in turn -> [frames * height * width] int64 on the CPU, a permutation.

    size: tokens along frames, height and width; tile: tokens of a tile along the same axes (order "tile" only).
    """
    if order == "raster":
        return torch.arange(size[0] * size[1] * size[2], device="cpu")
    if order == "tile":
        return _tiles(size, tile)
    if order == "hilbert":
        return _hilbert(size)
    raise PolicyError(f"The order of tokens is {order!r}; {nearest(order, ORDERS)}.")


def _tiles(size: Box, tile: Box) -> Tensor:
    coordinates = torch.stack(torch.meshgrid(*(torch.arange(n, device="cpu") for n in size), indexing="ij"), -1)
    step = torch.tensor(tile, device="cpu")
    tiles = (coordinates // step).reshape(-1, 3)
    counts = [-(-length // along) for length, along in zip(size, tile)]
    numbers = (tiles[:, 0] * counts[1] + tiles[:, 1]) * counts[2] + tiles[:, 2]
    return torch.argsort(numbers, stable=True)  # stable: raster order inside a tile


# -------------------------------------------------------------------------------------------------------------- hilbert


def _hilbert(size: Box) -> Tensor:
    """The walk begins in the corner (0, 0, 0) and leads along its longest even axis, else its longest.

    Each token is one step from the one before it. The exception: in a video with an odd side, single steps may be
    diagonal, one along each of two axes.
    """
    axes = sorted(enumerate(size), key=lambda item: (item[1] % 2, -item[1], -item[0]))
    points = torch.tensor(list(_walk((0, 0, 0), *axes)), device="cpu").reshape(-1, 3)
    return (points[:, 0] * size[1] + points[:, 1]) * size[2] + points[:, 2]


def _walk(start: Point, a: Axis, b: Axis, c: Axis) -> Iterator[Point]:
    """Every point of a box, from `start`, a corner of it, to the corner at the other end of its axis a."""
    long, wide, deep = (abs(length) for _, length in (a, b, c))
    if wide == deep == 1:
        for n in range(long):
            yield _moved(start, (a[0], n if a[1] > 0 else -n))
        return
    if wide < deep:
        b, c, wide, deep = c, b, deep, wide
    if 2 * long > 3 * wide and long > 2:  # two boxes end to end
        first, second = _halves(a)
        yield from _walk(start, first, b, c)
        yield from _walk(_moved(start, first), second, b, c)
        return
    a1, a2 = _halves(a)
    b1, b2 = _halves(b)
    if long == 1:  # nothing to come back along: over b and back is not possible, so b itself is walked
        yield from _walk(start, b, a, c)
        return
    far = _moved(start, _last(a))  # where the walk ends
    if 3 * wide > 4 * deep or deep == 1:  # out along b, across along a, back along b
        yield from _walk(start, b1, c, a1)
        yield from _walk(_moved(start, b1), a, b2, c)
        yield from _walk(_moved(far, _last(b1)), _back(b1), c, _back(a2))
        return
    c1, c2 = _halves(c)
    across = _moved(start, _last(c))
    yield from _walk(start, b1, c1, a1)
    yield from _walk(_moved(start, b1), c, a1, b2)
    yield from _walk(_moved(across, _last(b1)), a, _back(b1), _back(c2))
    yield from _walk(_moved(_moved(far, b1), _last(c)), _back(c), _back(a2), b2)
    yield from _walk(_moved(far, _last(b1)), _back(b1), c1, _back(a2))


def _halves(axis: Axis) -> tuple[Axis, Axis]:
    """Two parts of an axis; the first has an even length if there is room, so that a walk out along it comes back."""
    which, length = axis
    size = abs(length)
    half = size // 2
    if half % 2 and size > 2:
        half += 1
    sign = 1 if length > 0 else -1
    return (which, sign * half), (which, sign * (size - half))


def _moved(point: Point, along: Axis) -> Point:
    return tuple(value + along[1] if axis == along[0] else value for axis, value in enumerate(point))  # type: ignore[return-value]


def _last(axis: Axis) -> Axis:
    """The way to the last point of an axis: one step less than its length."""
    return axis[0], axis[1] - (1 if axis[1] > 0 else -1)


def _back(axis: Axis) -> Axis:
    return axis[0], -axis[1]
