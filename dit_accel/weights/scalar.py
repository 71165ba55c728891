"""Scalar baselines: round to nearest, and GPTQ (2210.17323), uniform 2 to 4 bits with a scale and an offset a group.

w' = offset + scale * code. A group is `group` inputs of one row; at 128, two half-precision numbers make 0.25 bits.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dit_accel.errors import ArgumentError
from dit_accel.weights.hessian import check_hessian, damped, inverse_root

_SHRINKS = torch.linspace(1.0, 0.3, 36).tolist()  # parts of the range that clipping tries


@dataclasses.dataclass(frozen=True)
class Scalar:
    """A weight in uniform codes. codes: uint8 [O, I]. scale, offset: [O, ceil(I / group)]."""

    codes: Tensor
    scale: Tensor
    offset: Tensor
    bits: int
    group: int

    def dense(self) -> Tensor:
        """The weight -> float32 [O, I]."""
        inputs = self.codes.shape[1]
        scale, offset = (x.repeat_interleave(self.group, 1)[:, :inputs] for x in (self.scale, self.offset))
        return offset + scale * self.codes

    @property
    def bits_per_weight(self) -> float:
        """Bits of codes, and of scales and offsets at half precision, for each weight."""
        return self.bits + 32 * self.scale.numel() / self.codes.numel()


def round_to_nearest(weight: Tensor, bits: int, *, group: int = 128, clip: bool = True) -> Scalar:
    """Every weight to the nearest level of its group; no data. weight: [O, I].

    clip: look for the part of the group's range whose squared error is least; the whole range without.
    """
    _check(weight, bits, group)
    weight = weight.float()
    grids = [_grid(part, bits, clip) for part in weight.split(group, 1)]
    scale, offset = torch.cat([s for s, _ in grids], 1), torch.cat([o for _, o in grids], 1)
    codes = [_codes(part, *grid, bits) for part, grid in zip(weight.split(group, 1), grids)]
    return Scalar(torch.cat(codes, 1).to(torch.uint8), scale, offset, bits, group)


def gptq(
    weight: Tensor, hessian: Tensor, bits: int, *, group: int = 128, clip: bool = True, damping: float = 0.01
) -> Scalar:
    """Column by column, later columns making up for the error of each; a group's levels from what it has become.

    weight: [O, I]. hessian: [I, I].
    """
    _check(weight, bits, group)
    check_hessian(weight, hessian)
    left = weight.float().clone()
    upper = inverse_root(damped(hessian, damping))
    codes = torch.empty(left.shape, dtype=torch.uint8, device=left.device)
    scales, offsets = [], []
    inputs = left.shape[1]
    for start in range(0, inputs, group):
        stop = min(start + group, inputs)
        block, local = left[:, start:stop], upper[start:stop, start:stop]
        scale, offset = _grid(block, bits, clip)
        errors = torch.empty_like(block)
        for j in range(stop - start):
            column = block[:, j : j + 1]
            code = _codes(column, scale, offset, bits)
            error = (column - (offset + scale * code)) / local[j, j]
            codes[:, start + j : start + j + 1] = code.to(torch.uint8)
            block[:, j + 1 :] -= error @ local[j : j + 1, j + 1 :]
            errors[:, j : j + 1] = error
        left[:, stop:] -= errors @ upper[start:stop, stop:]
        scales.append(scale)
        offsets.append(offset)
    return Scalar(codes, torch.cat(scales, 1), torch.cat(offsets, 1), bits, group)


def _check(weight: Tensor, bits: int, group: int) -> None:
    if not 2 <= bits <= 8:
        raise ArgumentError(f"Scalar codes of {bits} bits are not offered; give 2 to 8.")
    if weight.ndim != 2 or group < 1:
        raise ArgumentError(f"Groups of {group} of a weight of shape {list(weight.shape)}; give 1 or more, and [O, I].")


def _grid(part: Tensor, bits: int, clip: bool) -> tuple[Tensor, Tensor]:
    """Scale and offset of one group of each row -> [O, 1] each. part: [O, group]."""
    low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
    steps = 2**bits - 1
    best, scale, offset = torch.full_like(low, torch.inf), torch.ones_like(low), low
    for shrink in _SHRINKS if clip else [1.0]:
        middle, half = (low + high) / 2, (high - low) / 2 * shrink
        tried_scale, tried_offset = torch.where(half > 0, 2 * half / steps, 1.0), middle - half
        made = tried_offset + tried_scale * _codes(part, tried_scale, tried_offset, bits)
        error = (part - made).square().sum(1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scale, offset = torch.where(better, tried_scale, scale), torch.where(better, tried_offset, offset)
    return scale, offset


def _codes(part: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    """Nearest levels, as floats -> as part. part: [O, m]. scale, offset: [O, 1]."""
    return ((part - offset) / scale).round().clamp(0, 2**bits - 1)
