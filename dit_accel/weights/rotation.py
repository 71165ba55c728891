"""Signed block Hadamard rotation of a layer's inputs (QuIP#, HIGGS): makes weights look Gaussian, for any weights.

y = (x * s) H, with signs s and H of orthonormal Hadamard blocks along the diagonal. Inputs and rows of a weight are
rotated alike, so that x W^T = y W'^T; H is its own inverse, so going back is (y H) * s.
"""

from __future__ import annotations

import functools
import random

import torch
from torch import Tensor

from dit_accel.errors import ArgumentError, CheckpointError

LARGEST = 1024  # block; larger ones cost more and gain nothing


def block_of(inputs: int, largest: int = LARGEST) -> int:
    """Size of the Hadamard blocks: the largest power of two that divides the inputs, at most `largest`."""
    if inputs < 1 or largest < 1 or largest & (largest - 1):
        raise ArgumentError(f"No blocks for {inputs} inputs of at most {largest}; give 1 or more, and a power of two.")
    return min(inputs & -inputs, largest)


def hadamard(x: Tensor, block: int) -> Tensor:
    """Fast Walsh-Hadamard transform of each block of the last dimension -> as x. x: [..., I], a multiple of block.

    H of p * q is H of p (x) H of q, so factors of 32 or less are applied one after the other: block * 64 products for
    1024 in place of 1024 * 1024, as two matrix products.
    """
    if block < 1 or block & (block - 1) or x.shape[-1] % block:
        raise ArgumentError(
            f"Blocks of {block} do not fit {x.shape[-1]} inputs; give a power of two that divides them."
        )
    right = min(block, 32)
    parts = x.reshape(-1, right) @ _matrix(right, x.dtype, x.device)
    left = block // right
    while left > 1:
        size = min(left, 32)
        parts = _matrix(size, x.dtype, x.device) @ parts.reshape(-1, size, right)
        left, right = left // size, right * size
    return parts.reshape(x.shape)


@functools.cache
def _matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Orthonormal Sylvester Hadamard matrix -> [size, size], size at most 32."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix / size**0.5).to(dtype).to(device)


def draw_signs(inputs: int, seed: int) -> Tensor:
    """Packed signs, by Python's own generator -> uint8 [ceil(I / 8)]; the same for a seed on every machine."""
    length = -(-inputs // 8)
    packed = bytearray(random.Random(seed).randbytes(length))
    if inputs % 8:
        packed[-1] &= (1 << inputs % 8) - 1
    return torch.frombuffer(packed, dtype=torch.uint8).clone()


def unpack_signs(packed: Tensor, inputs: int) -> Tensor:
    """Signs as numbers -> float32 [I] of 1 and -1. packed: uint8 [ceil(I / 8)], bit i % 8 of byte i // 8 set for -1."""
    if packed.dtype != torch.uint8 or packed.shape != (-(-inputs // 8),):
        raise CheckpointError(
            f"Signs are {packed.dtype} of shape {list(packed.shape)}; for {inputs} inputs they are torch.uint8 of "
            f"shape [{-(-inputs // 8)}]."
        )
    bits = (packed.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    if int(bits.flatten()[inputs:].sum()):
        raise CheckpointError("The bits after the last sign are not zero; the file is damaged or of another shape.")
    return 1.0 - 2.0 * bits.flatten()[:inputs].float()


def rotate(x: Tensor, signs: Tensor, block: int) -> Tensor:
    """Rows of a weight [O, I], or activations [..., I], in rotated inputs -> as x. signs: [I] of 1 and -1."""
    return hadamard(x * signs.to(x.dtype), block)


def unrotate(x: Tensor, signs: Tensor, block: int) -> Tensor:
    """The inverse of `rotate` -> as x. x: [..., I]. signs: [I] of 1 and -1."""
    return hadamard(x, block) * signs.to(x.dtype)


def rotate_hessian(hessian: Tensor, signs: Tensor, block: int) -> Tensor:
    """E[x^T x] of the rotated inputs -> [I, I]. hessian: [I, I], of the inputs as they are. signs: [I]."""
    half = rotate(hessian, signs, block)
    return rotate(half.T, signs, block)
