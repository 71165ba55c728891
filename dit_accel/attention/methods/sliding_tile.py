"""Sliding Tile Attention (2502.04507): every tile of tokens sees the tiles of a window around its own, chosen offline.

The window's centre is the query's tile, moved inwards at the borders so that the window stays whole. Text is seen by
all and sees all. Each head may have a window of its own; the authors' lists, searched for each model, are data that
belongs in `Window.heads`. A block of keys is kept if any of its tokens is in a tile that a token of the query block
sees, so blocks should divide tiles.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dit_accel.attention.block_sparse import BlockSparse, Window
from dit_accel.attention.layout import Layout
from dit_accel.attention.order import Box
from dit_accel.attention.score import Call, Scored
from dit_accel.errors import PolicyError


def settings(
    size: Box = (3, 3, 3), heads: tuple[Box, ...] | None = None, tile: Box = (6, 8, 8), block_size: int = 64
) -> BlockSparse:
    """The authors' tile of 384 tokens and window of 3 x 3 x 3 tiles, for HunyuanVideo at 30 x 48 x 80 tokens."""
    window = Window("tile", size, heads)
    return BlockSparse(
        0.0,
        threshold=0.0,
        score="window",
        keep=("text",),
        block_size=block_size,
        order="tile",
        tile=tile,
        window=window,
    )


@functools.lru_cache(maxsize=64)
def sees(layout: Layout, size: Box) -> Tensor:
    """Pairs of blocks of which any token's window of `size` tiles holds a token of the other -> [n, n] bool."""
    grid, device = layout.grid, layout.device
    image = grid.image_tokens
    counts = [-(-length // along) for length, along in zip((grid.frames, grid.height, grid.width), layout.tile)]
    with torch.inference_mode(False):
        tile = layout.coordinates[:image] // torch.tensor(layout.tile, device=device)
        number = (tile[:, 0] * counts[1] + tile[:, 1]) * counts[2] + tile[:, 2]
        block = torch.arange(image, device=device) // layout.block_size
        holds = torch.zeros(layout.blocks, counts[0] * counts[1] * counts[2], device=device)
        holds[block, number] = 1.0
        pairs = torch.ones(1, 1, device=device)
        for count, window in zip(counts, size):
            pairs = torch.kron(pairs, _along(count, window, device).float())
        return holds @ pairs @ holds.mT > 0


def _along(count: int, window: int, device: torch.device) -> Tensor:
    """Tiles that each tile sees along one axis -> [count, count] bool."""
    tiles = torch.arange(count, device=device)
    half = window // 2
    centre = tiles.clamp(min=half).clamp(max=count - 1 - half)
    return (tiles - centre[:, None]).abs() <= half


def scores(call: Call) -> Scored:
    """1 for the pairs of blocks in the window, else 0: [1, 1, n, n], or [1, H, n, n] where heads have their own."""
    window, heads = call.settings.window, call.q.shape[1]
    assert window is not None
    if window.heads is not None and len(window.heads) != heads:
        raise PolicyError(
            f"Window.heads has {len(window.heads)} windows, but there are {heads} heads; give one for each, or null."
        )
    masks = [sees(call.layout, size) for size in window.heads or (window.size,)]
    return Scored(torch.stack(masks)[None].float())
