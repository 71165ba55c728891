"""Selection by hand: floor, cumulative probability, ties, blocks out of the contest, budgets of heads."""

import pytest
import torch
from torch import Tensor

from dit_accel.attention.block_sparse import BlockSparse
from dit_accel.attention.select import adaptive_density, blocks_for, select

ROW = [0.1, 0.4, 0.05, 0.3, 0.15]  # sorted: blocks 1 3 4 0 2 with 0.4 0.7 0.85 0.95 1.0


def kept(settings: BlockSparse, *rows: list[float], **more: Tensor) -> list[list[int]]:
    """Numbers of the kept blocks of each row."""
    keep = select(settings, torch.tensor([[rows]]), **more)[0, 0]
    return [[n for n, flag in enumerate(row) if flag] for row in keep.tolist()]


def test_the_floor_is_rounded_up_and_never_empty() -> None:
    assert kept(BlockSparse(0.4), ROW) == [[1, 3]]
    assert kept(BlockSparse(0.41), ROW) == [[1, 3, 4]]
    assert kept(BlockSparse(0.01), ROW) == [[1]]
    assert kept(BlockSparse(0.0, top_p=0.0), ROW) == [[1]]
    assert kept(BlockSparse(1.0), ROW) == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize(("share", "of", "blocks"), [(0.28, 25, 7), (0.14, 50, 7), (0.25, 64, 16), (0.251, 64, 17)])
def test_a_whole_number_of_blocks_stays_one(share: float, of: int, blocks: int) -> None:
    assert int(blocks_for(share, of)) == blocks
    assert int(select(BlockSparse(share), torch.rand(1, 1, 1, of)).sum()) == blocks


def test_of_equals_the_first_comes_first() -> None:
    assert kept(BlockSparse(0.4), [0.2] * 5, [0.0] * 5, [0.1, 0.3, 0.2, 0.3, 0.1]) == [[0, 1], [0, 1], [1, 3]]


def test_the_block_that_reaches_top_p_is_kept() -> None:
    eighths = [0.125, 0.5, 0.25, 0.125]  # sums .5 .75 .875 1, exact in binary
    assert kept(BlockSparse(0.0, top_p=0.5), eighths) == [[1]]
    assert kept(BlockSparse(0.0, top_p=0.51), eighths) == [[1, 2]]
    assert kept(BlockSparse(0.0, top_p=0.75), eighths) == [[1, 2]]
    assert kept(BlockSparse(0.0, top_p=1.0), eighths) == [[0, 1, 2, 3]]


def test_top_p_only_adds_to_the_floor() -> None:
    assert kept(BlockSparse(0.6, top_p=0.3), ROW) == [[1, 3, 4]]
    assert kept(BlockSparse(0.2, top_p=0.8), ROW) == [[1, 3, 4]]


def test_rows_are_taken_to_sum_to_1() -> None:
    assert kept(BlockSparse(0.0, top_p=0.65), [10 * p for p in ROW]) == [[1, 3]]
    assert kept(BlockSparse(0.0, threshold=0.12), [10 * p for p in ROW]) == [[1, 3, 4]]


def test_the_threshold_adds_what_is_above_it() -> None:
    assert kept(BlockSparse(0.0, threshold=0.12), ROW) == [[1, 3, 4]]
    assert kept(BlockSparse(0.8, threshold=0.12), ROW) == [[0, 1, 3, 4]]
    assert kept(BlockSparse(0.0, threshold=0.9), ROW) == [[1]], "the best block stays"


def test_blocks_out_of_the_contest_take_no_place_and_no_probability() -> None:
    fixed = torch.tensor([False, True, False, False, False])
    # of 0.1 0.05 0.3 0.15, summing to 0.6: half are two of four, and 0.5 + 0.25 reaches 0.7
    assert kept(BlockSparse(0.5), ROW, fixed=fixed) == [[3, 4]]
    assert kept(BlockSparse(0.0, top_p=0.7), ROW, fixed=fixed) == [[3, 4]]
    assert kept(BlockSparse(0.0, top_p=0.5), ROW, fixed=fixed) == [[3]]
    # zeros in the contest still come before it
    assert kept(BlockSparse(0.5), [0.9, 0.0, 0.0, 0.0, 0.1], fixed=fixed.roll(-1)) == [[1, 4]]
    assert kept(BlockSparse(0.5), ROW, fixed=torch.ones(5, dtype=torch.bool)) == [[]]


def test_budgets_of_rows_take_the_place_of_top_p() -> None:
    settings = BlockSparse(0.0, top_p=0.99, score="proxy", budget="proxy")
    assert kept(settings, ROW, ROW, counts=torch.tensor([[[1, 3]]])) == [[1], [1, 3, 4]]
    assert kept(BlockSparse(0.4, top_p=0.9), ROW, counts=torch.tensor([[[1]]])) == [[1, 3]], "the density is a floor"


def test_heads_with_recall_to_spare_give_blocks_to_those_without() -> None:
    # sparsity .8: heads above .8 get .9, that is half the blocks; as many of the worst get .7
    recall = torch.tensor([[0.95, 0.5, 0.85, 0.7, 0.3]])
    densities = adaptive_density(0.2, 0.8, recall)[0]
    assert densities.tolist() == pytest.approx([0.1, 0.3, 0.1, 0.2, 0.3])
    assert float(densities.mean()) == pytest.approx(0.2)
    # more than half of the heads have enough: the two best give, the two worst take
    recall = torch.tensor([[0.9, 0.99, 0.95, 0.85, 0.98]])
    assert adaptive_density(0.2, 0.8, recall)[0].tolist() == pytest.approx([0.3, 0.1, 0.2, 0.3, 0.1])
    assert adaptive_density(0.2, 0.8, torch.tensor([[0.8, 0.2]]))[0].tolist() == pytest.approx([0.2, 0.2])
    # a density near 1 has less to give, and at 1 nothing
    assert adaptive_density(0.9, 0.8, torch.tensor([[0.99, 0.9]]))[0].tolist() == pytest.approx([0.8, 1.0])
    assert adaptive_density(1.0, 0.8, torch.tensor([[1.0, 1.0]]))[0].tolist() == [1.0, 1.0]


def test_each_sample_has_its_own_budgets() -> None:
    sharp, flat = [0.9, 0.1, 0.0, 0.0], [0.25] * 4
    one = torch.tensor([[[sharp], [flat]]])  # heads of one sample
    both = torch.cat([one, one.flip(1)])
    counts = select(BlockSparse(0.5, score="mass", budget="adaptive"), both).sum(-1)[..., 0]
    assert counts.tolist() == [[1, 3], [3, 1]]
