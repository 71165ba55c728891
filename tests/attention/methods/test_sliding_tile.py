"""Sliding Tile Attention: windows of tiles, moved inwards at the borders, against loops over tokens."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dit_accel.attention.grid import TokenGrid
from dit_accel.attention.layout import layout_of
from dit_accel.attention.methods.sliding_tile import scores, sees, settings
from dit_accel.attention.score import Call
from dit_accel.attention.search import search
from dit_accel.errors import PolicyError

Draw = Callable[..., tuple[Tensor, Tensor, Tensor]]


def window(tile: int, tiles: int, size: int) -> range:
    """Tiles that a tile sees along one axis: `size` of them, around it, but inside."""
    half = min(size // 2, (tiles - 1) // 2) if size % 2 else size // 2
    if size >= tiles:
        return range(tiles)
    start = min(max(tile - half, 0), tiles - size)
    return range(start, start + size)


@pytest.mark.parametrize("grid", [TokenGrid(4, 10, 8), TokenGrid(3, 9, 10, 9)], ids=["whole", "ragged"])
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 1, 3), (1, 3, 5), (7, 7, 7)])
def test_blocks_of_which_a_token_sees_a_token(grid: TokenGrid, size: tuple[int, int, int]) -> None:
    tile = (2, 2, 4)
    layout = layout_of(grid, "tile", tile, 16)
    tiles = [-(-n // t) for n, t in zip((grid.frames, grid.height, grid.width), tile)]
    expected = torch.zeros(layout.blocks, layout.blocks, dtype=torch.bool)
    own = [[x // t for x, t in zip(place, tile)] for place in layout.coordinates[: grid.image_tokens].tolist()]
    for i, a in enumerate(own):
        spans = [window(at, count, length) for at, count, length in zip(a, tiles, size)]
        for j, b in enumerate(own):
            if all(at in span for at, span in zip(b, spans)):
                expected[i // 16, j // 16] = True
    assert torch.equal(sees(layout, size), expected)


def test_in_whole_tiles_every_block_sees_as_many(draw: Draw) -> None:
    # tiles of 2 x 2 x 4 are blocks; 3 x 4 x 3 of them, windows of 3 x 3 x 3: never cut at a border
    layout = layout_of(TokenGrid(6, 8, 12), "tile", (2, 2, 4), 16)
    assert set(sees(layout, (3, 3, 3)).sum(-1).tolist()) == {27}
    rule = settings((3, 3, 1), tile=(2, 2, 4), block_size=16)
    mask = search(rule, layout, *draw(2, 3, 576, 8), scale=1.0).mask
    assert mask.shape[:2] == (1, 1) and set(mask.counts.flatten().tolist()) == {9}, "one mask for all heads"


def test_heads_have_windows_of_their_own(draw: Draw, call: Callable[..., Call]) -> None:
    rule = settings(heads=((1, 1, 1), (3, 4, 3)), tile=(2, 2, 4), block_size=16)
    grid = TokenGrid(6, 8, 12)
    q, k, v = draw(1, 2, 576, 8)
    counts = search(rule, layout_of(grid, "tile", (2, 2, 4), 16), q, k, v, scale=1.0).mask.counts
    assert (
        counts.shape == (1, 2, 36) and counts[0, 0].unique().tolist() == [1] and counts[0, 1].unique().tolist() == [36]
    )
    with pytest.raises(PolicyError, match="2 windows, but there are 3 heads"):
        scores(call(rule, *draw(1, 3, 576, 8)[:2], grid=grid))


def test_text_is_seen_by_all_and_sees_all(draw: Draw) -> None:
    rule = settings((1, 1, 1), tile=(2, 2, 4), block_size=16)
    layout = layout_of(TokenGrid(2, 4, 8, 16), "tile", (2, 2, 4), 16)
    keep = search(rule, layout, *draw(1, 1, 80, 8), scale=1.0).mask.to_dense()[0, 0].int().tolist()
    assert keep == [[int(i == j or 4 in (i, j)) for j in range(5)] for i in range(5)]
