"""BlockMask: the CSR lists against the dense mask, what it reports, and every refusal."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from dit_accel_kernels import BlockMask, KernelError
from torch import Tensor


def lists(row_pointers: list[int], columns: list[int], n_k: int = 3) -> dict[str, object]:
    """Arguments of a mask with one head and `len(row_pointers) - 1` query blocks."""
    return {
        "row_pointers": torch.tensor(row_pointers, dtype=torch.int32),
        "columns": torch.tensor(columns, dtype=torch.int32),
        "shape": (1, 1, len(row_pointers) - 1, n_k),
    }


def test_lists_of_a_small_mask() -> None:
    keep = torch.tensor([[[[1, 0, 1], [0, 0, 0]]], [[[0, 1, 0], [1, 1, 1]]]], dtype=torch.bool)
    mask = BlockMask.from_dense(keep)
    assert mask.row_pointers.tolist() == [0, 2, 2, 3, 6]
    assert mask.columns.tolist() == [0, 2, 1, 0, 1, 2]
    assert mask.row_pointers.dtype == mask.columns.dtype == torch.int32
    assert mask.counts.tolist() == [[[2, 0]], [[1, 3]]]
    assert mask.density == 0.5
    assert mask.shape == (2, 1, 2, 3)
    assert (mask.block_q, mask.block_k) == (64, 64)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 3, 5, 7), (2, 1, 64, 33), (3, 2, 1, 40)])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_to_dense_is_the_inverse(shape: tuple[int, int, int, int], density: float) -> None:
    torch.manual_seed(0)
    keep = torch.rand(shape) < density
    mask = BlockMask.from_dense(keep, (32, 128))
    assert torch.equal(mask.to_dense(), keep)
    assert (mask.block_q, mask.block_k) == (32, 128)
    assert mask.density == pytest.approx(keep.float().mean().item())
    assert mask.is_full == bool(keep.all())
    BlockMask(mask.row_pointers, mask.columns, mask.shape)  # passes the checks of lists that were made by hand


def test_a_view_that_is_not_contiguous_is_read_right() -> None:
    keep = torch.rand(2, 5, 3, 4).permute(0, 2, 3, 1) < 0.5
    assert torch.equal(BlockMask.from_dense(keep).to_dense(), keep)
    assert torch.equal(BlockMask.from_dense(keep[:1].expand(4, -1, -1, -1)).to_dense()[3], keep[0])


def test_to_keeps_everything() -> None:
    mask = BlockMask.from_dense(torch.rand(1, 2, 3, 4) < 0.5, 32)
    moved = mask.to("cpu")
    assert torch.equal(moved.to_dense(), mask.to_dense())
    assert (moved.shape, moved.block_q, moved.block_k) == (mask.shape, 32, 32)
    assert mask.to("meta").device.type == "meta"


def test_it_is_frozen() -> None:
    mask = BlockMask.from_dense(torch.ones(1, 1, 1, 1, dtype=torch.bool))
    with pytest.raises(dataclasses.FrozenInstanceError):
        mask.block_q = 32  # type: ignore[misc]


@pytest.mark.parametrize(
    ("keep", "told"),
    [
        (torch.ones(1, 1, 2, 2), "keep is torch.float32"),
        (torch.ones(2, 2, dtype=torch.bool), r"keep is torch.bool \[2, 2\]"),
        ([[True]], "keep is list"),
        (torch.ones(1, 0, 2, 2, dtype=torch.bool), r"shape \[1, 0, 2, 2\]"),
    ],
)
def test_what_from_dense_refuses(keep: Tensor, told: str) -> None:
    with pytest.raises(KernelError, match=told):
        BlockMask.from_dense(keep)


@pytest.mark.parametrize("size", [0, 8, 24, 72, 512, -16, 64.0, (64, 20), (8, 64)])
def test_block_sizes_that_are_refused(size: object) -> None:
    with pytest.raises(KernelError, match="multiple of 16"):
        BlockMask.from_dense(torch.ones(1, 1, 1, 1, dtype=torch.bool), size)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (lists([0, 1], [3]), "indices 3 to 3"),
        (lists([0, 1], [-1]), "indices -1"),
        (lists([0, 2], [1, 1]), "must rise"),
        (lists([0, 2], [1, 0]), "must rise"),
        (lists([0, 2, 1, 3], [0, 1, 2]), "falls"),
        (lists([0, 1], [0, 1]), "entries from 0 to"),
        (lists([1, 2], [0, 1]), "entries from 0 to"),
        (lists([0, 1], [0]) | {"shape": (1, 2, 1, 3)}, "= 3 entries"),
        (lists([0, 1], [0]) | {"shape": (1, 1, 3)}, "shape is"),
        (lists([0, 1], [0]) | {"columns": torch.tensor([0])}, "columns is torch.int64"),
        (lists([0, 1], [0]) | {"row_pointers": torch.tensor([[0, 1]], dtype=torch.int32)}, "row_pointers is"),
        (lists([0, 1], [0]) | {"columns": torch.zeros(1, dtype=torch.int32, device="meta")}, "move both"),
        (lists([0, 1], [0]) | {"block_k": 17}, "block_k is 17"),
    ],
)
def test_lists_that_are_refused(arguments: dict[str, object], told: str) -> None:
    with pytest.raises(KernelError, match=told):
        BlockMask(**arguments)


def test_lists_with_empty_rows_pass() -> None:
    """The check for rising columns looks across no border of a row, empty rows at either end included."""
    mask = BlockMask(**lists([0, 0, 2, 2, 3, 3], [1, 2, 0]))
    assert mask.to_dense().int().tolist() == [[[[0, 0, 0], [0, 1, 1], [0, 0, 0], [1, 0, 0], [0, 0, 0]]]]
