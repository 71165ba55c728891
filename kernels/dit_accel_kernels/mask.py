"""BlockMask: which key blocks each query block attends to, as CSR lists, ready for every kernel."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dit_accel_kernels.errors import KernelError

SMALLEST_BLOCK, LARGEST_BLOCK, BLOCK_STEP = 16, 256, 16


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Kept (query block, key block) pairs of attention over [B, H, S_q, D] and [B, H, S_k, D].

    Row r = (b * H + h) * n_q + i keeps the key blocks `columns[row_pointers[r] : row_pointers[r + 1]]`, ascending and
    each once. A last block may be ragged: n_q = ceil(S_q / block_q), n_k = ceil(S_k / block_k).
    B or H of 1 in `shape` is shared by every sample or head of the tensors; nothing is copied.
    """

    row_pointers: Tensor  # int32 [B * H * n_q + 1], from 0 to the number of kept pairs
    columns: Tensor  # int32 [kept pairs]
    shape: tuple[int, int, int, int]  # (B, H, n_q, n_k)
    block_q: int = 64
    block_k: int = 64
    trusted: bool = field(default=False, repr=False)  # True: built by this class, so the lists are not checked again

    def __post_init__(self) -> None:
        for name, size in (("block_q", self.block_q), ("block_k", self.block_k)):
            check_block_size(name, size)
        if not self.trusted:
            check_lists(self)

    @classmethod
    def from_dense(cls, keep: Tensor, block_size: int | tuple[int, int] = 64) -> BlockMask:
        """The mask of `keep`, bool [B, H, n_q, n_k]; `block_size` in tokens is one number or (block_q, block_k)."""
        if not isinstance(keep, Tensor) or keep.dtype != torch.bool or keep.dim() != 4:
            given = f"{keep.dtype} {list(keep.shape)}" if isinstance(keep, Tensor) else type(keep).__name__
            raise KernelError(f"keep is {given}, but it must be a bool tensor [B, H, n_q, n_k]; use scores > limit.")
        if keep.numel() == 0:
            raise KernelError(f"keep has shape {list(keep.shape)} and no entry, but each of B, H, n_q, n_k must be 1+.")
        block_q, block_k = block_size if isinstance(block_size, tuple) else (block_size, block_size)
        batch, heads, n_q, n_k = keep.shape
        rows = keep.reshape(-1, n_k)
        row_pointers = torch.zeros(len(rows) + 1, dtype=torch.int32, device=keep.device)
        torch.cumsum(rows.sum(-1, dtype=torch.int32), 0, dtype=torch.int32, out=row_pointers[1:])
        columns = rows.reshape(-1).nonzero().view(-1).remainder_(n_k).to(torch.int32)
        return cls(row_pointers, columns, (batch, heads, n_q, n_k), block_q, block_k, trusted=True)

    @property
    def counts(self) -> Tensor:
        """Kept key blocks of each query block, int32 [B, H, n_q]."""
        return self.row_pointers.diff().view(self.shape[:3])

    @property
    def density(self) -> float:
        """Kept block pairs / all block pairs: 1 - sparsity."""
        batch, heads, n_q, n_k = self.shape
        return self.columns.numel() / (batch * heads * n_q * n_k)

    @property
    def is_full(self) -> bool:
        """True where no pair is left out, so that plain dense attention gives the same result."""
        return self.density == 1.0

    @property
    def device(self) -> torch.device:
        return self.columns.device

    def to(self, device: torch.device | str) -> BlockMask:
        """The same mask with its lists on `device`."""
        lists = self.row_pointers.to(device), self.columns.to(device)
        return BlockMask(*lists, self.shape, self.block_q, self.block_k, trusted=True)

    def to_dense(self) -> Tensor:
        """Bool [B, H, n_q, n_k], the inverse of `from_dense`."""
        batch, heads, n_q, n_k = self.shape
        keep = torch.zeros(batch * heads * n_q, n_k, dtype=torch.bool, device=self.device)
        rows = torch.arange(len(keep), device=self.device).repeat_interleave(self.row_pointers.diff())
        keep[rows, self.columns.long()] = True
        return keep.view(self.shape)


def check_block_size(name: str, size: int) -> None:
    if not isinstance(size, int) or size % BLOCK_STEP or not SMALLEST_BLOCK <= size <= LARGEST_BLOCK:
        raise KernelError(
            f"{name} is {size!r}, but a block has {SMALLEST_BLOCK} to {LARGEST_BLOCK} tokens, "
            f"a multiple of {BLOCK_STEP}; 64 is a good choice."
        )


def check_lists(mask: BlockMask) -> None:
    """Lists that were made by hand: a wrong one would make a kernel read outside of its tensors."""
    if len(mask.shape) != 4 or min(mask.shape) < 1:
        raise KernelError(f"shape is {mask.shape}, but it must be (B, H, n_q, n_k), each 1 or more.")
    batch, heads, n_q, n_k = mask.shape
    for name, tensor in (("row_pointers", mask.row_pointers), ("columns", mask.columns)):
        if tensor.dtype != torch.int32 or tensor.dim() != 1 or not tensor.is_contiguous():
            raise KernelError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}, but it must be contiguous int32 with one dimension; "
                f"use {name}.int().flatten()."
            )
    if mask.row_pointers.device != mask.columns.device:
        raise KernelError(
            f"row_pointers is on {mask.row_pointers.device} and columns on {mask.columns.device}; move both to one."
        )
    rows, kept = batch * heads * n_q, len(mask.columns)
    steps = mask.row_pointers.diff()
    if len(mask.row_pointers) != rows + 1 or mask.row_pointers[0] != 0 or mask.row_pointers[-1] != kept:
        raise KernelError(
            f"row_pointers must have B * H * n_q + 1 = {rows + 1} entries from 0 to len(columns) = {kept}, "
            f"but has {len(mask.row_pointers)}; build the mask with BlockMask.from_dense."
        )
    if (steps < 0).any():
        raise KernelError("row_pointers falls, but it must never; build the mask with BlockMask.from_dense.")
    if kept and (mask.columns.min() < 0 or mask.columns.max() >= n_k):
        low, high = int(mask.columns.min()), int(mask.columns.max())
        raise KernelError(
            f"columns holds indices {low} to {high}, but the {n_k} key blocks are 0 to {n_k - 1}; check n_k in shape."
        )
    rising = mask.columns.diff() > 0
    starts = mask.row_pointers[1:-1].long()
    rising[starts[(starts > 0) & (starts < kept)] - 1] = True
    if not rising.all():
        raise KernelError("columns must rise within a row, each index once; build the mask with BlockMask.from_dense.")
