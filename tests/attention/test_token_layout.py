"""Layouts: text behind the picture, blocks, and who neighbours whom, against loops over tokens."""

import itertools

import pytest
import torch
from torch import Tensor

from dit_accel.attention.grid import TokenGrid
from dit_accel.attention.layout import Layout, blocks_where, layout_of
from dit_accel.errors import ArgumentError

TILE = (2, 2, 2)
GRIDS = [
    TokenGrid(1, 1, 50),
    TokenGrid(3, 5, 4),
    TokenGrid(3, 5, 4, 9, text_first=True),
    TokenGrid(1, 8, 8, 16),
    TokenGrid(2, 9, 16),
    TokenGrid(0, 0, 0, 20),
]


def loops(layout: Layout, near: int) -> list[list[bool]]:
    """Blocks with image tokens at most `near` apart along every axis."""
    size, count = layout.block_size, layout.blocks
    pairs = [[False] * count for _ in range(count)]
    places = layout.coordinates.tolist()
    for (i, a), (j, b) in itertools.product(enumerate(places), repeat=2):
        if a[0] >= 0 and b[0] >= 0 and all(abs(x - y) <= near for x, y in zip(a, b)):
            pairs[i // size][j // size] = True
    return pairs


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("order", ["raster", "tile", "hilbert"])
def test_tokens_come_in_order_with_the_text_behind(grid: TokenGrid, order: str) -> None:
    layout = layout_of(grid, order, TILE, 16)
    sequence = torch.arange(grid.tokens)
    assert torch.equal(sequence[layout.permutation][layout.inverse], sequence)
    assert sorted(layout.permutation.tolist()) == sequence.tolist()
    assert layout.is_identity == torch.equal(layout.permutation, sequence)
    image, text = grid.image_tokens, grid.text_length
    text_start = 0 if grid.text_first else image
    assert layout.permutation[image:].tolist() == list(range(text_start, text_start + text))
    assert (layout.coordinates[image:] == -1).all()
    # a token's coordinates are those of its place in the sequence
    offset = text if grid.text_first else 0
    for place, (frame, row, column) in zip(layout.permutation[:image].tolist(), layout.coordinates[:image].tolist()):
        assert place - offset == (frame * grid.height + row) * grid.width + column
    assert layout.blocks == -(-grid.tokens // 16)
    expected = [any(i >= image for i in range(b * 16, min(b * 16 + 16, grid.tokens))) for b in range(layout.blocks)]
    assert layout.text_blocks.tolist() == expected


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("order", ["raster", "tile", "hilbert"])
def test_neighbours_hold_tokens_within_one_step(grid: TokenGrid, order: str) -> None:
    layout = layout_of(grid, order, TILE, 16)
    expected = torch.tensor(loops(layout, 1)) | torch.eye(layout.blocks, dtype=torch.bool)
    assert torch.equal(layout.neighbours, expected)


def test_neighbours_of_a_row_are_the_blocks_beside() -> None:
    near = layout_of(TokenGrid(1, 1, 80), "raster", TILE, 16).neighbours
    assert near.int().tolist() == [[int(abs(i - j) <= 1) for j in range(5)] for i in range(5)]


def test_the_first_frame_is_that_of_a_video() -> None:
    # frames of 24 tokens, blocks of 16: frame 0 is in blocks 0 and 1
    assert layout_of(TokenGrid(3, 4, 6), "raster", TILE, 16).first_frame.tolist() == [True, True, False, False, False]
    assert not layout_of(TokenGrid(1, 8, 8), "raster", TILE, 16).first_frame.any(), "a picture has nothing but one"


@pytest.mark.parametrize("grid", [*GRIDS, TokenGrid(7, 9, 11, 5)], ids=str)
def test_pairs_of_tokens_become_pairs_of_blocks(grid: TokenGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    def near(q: Tensor, k: Tensor) -> Tensor:
        return ((q - k).abs() <= 2).all(-1)

    layout = layout_of(grid, "hilbert", TILE, 16)
    expected = loops(layout, 2)
    assert blocks_where(layout, near).tolist() == expected
    monkeypatch.setattr("dit_accel.attention.layout.CHUNK", 1)  # one block of queries at a time
    assert blocks_where(layout, near).tolist() == expected


def test_one_layout_for_the_same_arguments_and_an_error_for_none() -> None:
    grid = TokenGrid(2, 3, 4)
    assert layout_of(grid, "tile", TILE, 16) is layout_of(TokenGrid(2, 3, 4), "tile", TILE, 16)
    layout = layout_of(grid, "tile", TILE, 16)
    assert layout.to(torch.device("cpu")) is layout
    moved = layout.to(torch.device("meta"))
    assert moved.device.type == "meta" and moved is layout.to(torch.device("meta"))
    with pytest.raises(ArgumentError, match="holds no tokens"):
        layout_of(TokenGrid(0, 4, 4), "tile", TILE, 16)


def test_a_layout_made_in_inference_mode_serves_gradients() -> None:
    with torch.inference_mode():
        layout = layout_of(TokenGrid(1, 3, 7), "hilbert", TILE, 16)
    x = torch.randn(21, 2, requires_grad=True)
    x.index_select(0, layout.permutation).sum().backward()
    assert x.grad is not None
