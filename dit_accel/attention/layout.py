"""Layout: the tokens of a grid in their order, cut into blocks, and what is known of the blocks from places alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.attention.grid import TokenGrid
from dit_accel.attention.order import Box, order_of
from dit_accel.errors import ArgumentError

TEXT = -1  # coordinate of what has no place
CHUNK = 1 << 18  # token pairs looked at in one go on a CPU, so that they stay in its cache


@dataclass(frozen=True, eq=False)
class Layout:
    """N tokens in n = ceil(N / block_size) blocks; image tokens first, in their order, text tokens behind them.

    permutation: place in the sequence of each token of the layout, [N]; inverse: the way back, [N]; is_identity: the
    layout is the sequence itself; coordinates: frame, row and column of each token of the layout, [N, 3], -1 for text;
    text_blocks: [n], any text in it; neighbours: [n, n], blocks with tokens within one step along all three axes of
    each other, itself included; first_frame: [n], any token of frame 0, nowhere where there is but one frame.
    Compared by identity: `layout_of` hands out one object for the same arguments.
    """

    grid: TokenGrid
    order: str
    tile: Box
    block_size: int
    permutation: Tensor
    inverse: Tensor
    is_identity: bool
    coordinates: Tensor
    text_blocks: Tensor
    neighbours: Tensor
    first_frame: Tensor

    @property
    def tokens(self) -> int:
        return self.grid.tokens

    @property
    def blocks(self) -> int:
        return -(-self.grid.tokens // self.block_size)

    @property
    def device(self) -> torch.device:
        return self.permutation.device

    def to(self, device: torch.device) -> Layout:
        """The same layout on another device; one object for each."""
        return self if device == self.device else layout_of(self.grid, self.order, self.tile, self.block_size, device)


@functools.lru_cache(maxsize=64)
def layout_of(grid: TokenGrid, order: str, tile: Box, block_size: int, device: torch.device | None = None) -> Layout:
    """The layout of a grid; device: where its tensors live, the CPU by default.

    A sequence without image structure is a grid of 1 x 1 x N: raster order, neighbours along the sequence.
    """
    if grid.tokens < 1 or min(grid.frames, grid.height, grid.width, grid.text_length) < 0:
        raise ArgumentError(f"{grid} holds no tokens; give a grid of one token or more.")
    with torch.inference_mode(False):  # so that the tensors can be used in any mode later
        return _made(grid, order, tile, block_size, device or torch.device("cpu"))


def _made(grid: TokenGrid, order: str, tile: Box, block_size: int, device: torch.device) -> Layout:
    size = (grid.frames, grid.height, grid.width)
    image, text = grid.image_tokens, grid.text_length
    told = order_of(size, order, tile) if image else torch.arange(0, device="cpu")
    offset, text_start = (text, 0) if grid.text_first else (0, image)
    permutation = torch.cat([told + offset, torch.arange(text_start, text_start + text, device="cpu")])
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(len(permutation), device="cpu")
    rows = grid.height * grid.width
    places = [told // rows, told // grid.width % grid.height, told % grid.width] if image else [told] * 3
    coordinates = torch.full((image + text, 3), TEXT, device="cpu")
    coordinates[:image] = torch.stack(places, -1)
    block = torch.arange(image + text, device="cpu") // block_size
    count = int(block[-1]) + 1

    def holding(tokens: Tensor) -> Tensor:
        return torch.zeros(count, dtype=torch.bool, device="cpu").index_fill_(0, block[tokens], True)

    first = coordinates[:, 0] == 0 if grid.frames > 1 else torch.zeros(image + text, dtype=torch.bool, device="cpu")
    moved = {
        "permutation": permutation,
        "inverse": inverse,
        "coordinates": coordinates,
        "text_blocks": holding(coordinates[:, 0] == TEXT),
        "neighbours": _neighbours(size, told, block[:image], count),
        "first_frame": holding(first),
    }
    identity = bool((permutation == torch.arange(len(permutation), device="cpu")).all())
    return Layout(
        grid, order, tile, block_size, is_identity=identity, **{name: value.to(device) for name, value in moved.items()}
    )


def _neighbours(size: Box, told: Tensor, block: Tensor, count: int) -> Tensor:
    """told: raster index of each image token in turn; block: the block that it is in -> [count, count]."""
    pairs = torch.eye(count, dtype=torch.bool, device="cpu")
    if not len(told):
        return pairs
    of_place = torch.empty_like(block)
    of_place[told] = block
    of_place = of_place.reshape(size)
    shifts = [(f, r, c) for f in (0, 1) for r in (-1, 0, 1) for c in (-1, 0, 1) if (f, r, c) > (0, 0, 0)]
    for shift in shifts:  # half of the 26 directions; the others mirror them
        if all(abs(step) < length for step, length in zip(shift, size)):
            one = of_place[tuple(slice(max(0, -s), n - max(0, s)) for s, n in zip(shift, size))].reshape(-1)
            other = of_place[tuple(slice(max(0, s), n - max(0, -s)) for s, n in zip(shift, size))].reshape(-1)
            pairs[one, other] = True
    return pairs | pairs.mT


def blocks_where(layout: Layout, sees: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Blocks of which any query token sees any key token -> [n, n] bool; text tokens see nothing and are not seen.

    sees: given the coordinates [Q, 1, 3] of queries and [1, K, 3] of keys, which pairs do -> [Q, K] bool. Looks at
    every pair of tokens, some rows at a time; its caller remembers the result.
    """
    image, size, count = layout.grid.image_tokens, layout.block_size, layout.blocks
    places = layout.coordinates[:image].int()
    seen = torch.zeros(count, count, dtype=torch.bool, device=layout.device)
    filled = -(-image // size)  # blocks with image tokens in them
    if not filled:
        return seen
    padded = filled * size - image
    pairs_held = CHUNK if layout.device.type == "cpu" else 256 * CHUNK
    rows = max(1, pairs_held // image // size)  # query blocks in one go
    for start in range(0, filled, rows):
        queries = places[start * size : (start + rows) * size]
        pairs = torch.nn.functional.pad(sees(queries[:, None], places[None]), (0, padded))
        by_key_block = pairs.reshape(len(queries), filled, size).any(-1)
        short = -len(queries) % size
        by_key_block = torch.nn.functional.pad(by_key_block, (0, 0, 0, short))
        seen[start : start + rows, :filled][: len(by_key_block) // size] = by_key_block.reshape(-1, size, filled).any(1)
    return seen
