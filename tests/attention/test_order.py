"""Orders of tokens: all of them permutations, near tokens near each other."""

import itertools

import pytest
import torch
from torch import Tensor

from dit_accel.attention.order import ORDERS, order_of
from dit_accel.errors import PolicyError

SIZES = [*itertools.product(range(1, 6), repeat=3), (1, 1, 37), (2, 9, 16), (5, 30, 52), (13, 7, 7)]


def places(size: tuple[int, int, int], order: str) -> Tensor:
    told = order_of(size, order)
    return torch.stack([told // (size[1] * size[2]), told // size[2] % size[1], told % size[2]], -1)


@pytest.mark.parametrize("order", ORDERS)
def test_every_token_is_told_once(order: str) -> None:
    for size in SIZES:
        told = order_of(size, order, (2, 3, 2))
        assert sorted(told.tolist()) == list(range(size[0] * size[1] * size[2])), size


def test_raster_is_the_sequence_itself() -> None:
    assert order_of((2, 2, 3), "raster").tolist() == list(range(12))


def test_tiles_one_after_another_and_ragged_at_the_ends() -> None:
    # 3 x 5 in tiles of 2 x 2:  0  1 |  2  3 |  4
    #                           5  6 |  7  8 |  9
    #                          10 11 | 12 13 | 14
    assert order_of((1, 3, 5), "tile", (4, 2, 2)).tolist() == [0, 1, 5, 6, 2, 3, 7, 8, 4, 9, 10, 11, 12, 13, 14]
    # frames belong to a tile as well: two frames of 1 x 4, tiles of 2 x 1 x 2
    assert order_of((2, 1, 4), "tile", (2, 1, 2)).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


def test_hilbert_on_a_square_of_four() -> None:
    # up a column, across, and down: the walk begins in a corner and ends in the one beside it
    assert order_of((1, 2, 2), "hilbert").tolist() == [0, 2, 3, 1]
    assert order_of((1, 1, 5), "hilbert").tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("size", [*itertools.product((2, 4, 6, 8), repeat=3), (8, 30, 52), (16, 24, 20)])
def test_on_even_sides_hilbert_goes_one_step_at_a_time(size: tuple[int, int, int]) -> None:
    steps = places(size, "hilbert").diff(dim=0).abs().sum(-1)
    assert set(steps.tolist()) == {1}


def test_in_a_picture_hilbert_goes_one_step_at_a_time_whatever_its_sides() -> None:
    for height, width in itertools.product(range(1, 18), repeat=2):
        steps = places((1, height, width), "hilbert").diff(dim=0).abs().sum(-1)
        assert set(steps.tolist()) <= {1}, (height, width)


def test_where_lengths_are_odd_a_step_may_be_diagonal_but_no_longer() -> None:
    diagonal = 0
    for size in SIZES:
        steps = places(size, "hilbert").diff(dim=0).abs()
        assert not len(steps) or int(steps.max()) == 1, size
        assert not len(steps) or int(steps.sum(-1).max()) <= 2, size
        diagonal += int((steps.sum(-1) == 2).sum())
    assert diagonal > 0, "the exception that the docstring names"


def test_hilbert_blocks_are_compact() -> None:
    # 64 tokens of a 16 x 16 x 16 box: a row of raster order spans 16 x 4, a block of the curve is a cube of 4
    spans = places((16, 16, 16), "hilbert").reshape(-1, 64, 3)
    widths = spans.amax(1) - spans.amin(1) + 1
    assert float(widths.float().mean()) < 5.5 and int(widths.max()) <= 8


def test_an_unknown_order() -> None:
    with pytest.raises(PolicyError, match="did you mean 'hilbert'"):
        order_of((1, 2, 2), "hilbrt")
