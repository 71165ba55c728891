"""A vector-quantised weight in plain PyTorch: packed codes, rotation and decoding, on any device, in any float dtype.

The format is that of dit_accel.weights (packing, rotation, storage); this package stands alone, so it reads it itself.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

WORDS = {4: (2, 1), 6: (4, 3), 8: (1, 1), 12: (2, 3)}  # bits of a code: codes and bytes of the smallest whole group


@dataclass(frozen=True)
class Weight:
    """W' [O, I] = row_scale_o * sum over stages of codewords (+ b a), in rotated inputs where `signs` is given.

    codes: uint8 [O, ceil(S * I / d * code_bits / 8)]. row_scale: [O]. codebook: [S, K, d]. signs: uint8 [ceil(I / 8)].
    low_rank: a [r, I], b [O, r].
    """

    codes: Tensor
    row_scale: Tensor
    codebook: Tensor
    code_bits: int
    inputs: int
    signs: Tensor | None = None
    block: int = 0
    low_rank: tuple[Tensor, Tensor] | None = None

    @property
    def outputs(self) -> int:
        return self.row_scale.shape[0]

    @property
    def codes_per_row(self) -> int:
        stages, _, width = self.codebook.shape
        return stages * self.inputs // width

    def table(self, dtype: torch.dtype) -> Tensor:
        """The codebook with zeros up to an entry for every code there can be -> [S, 2 ** code_bits, d].

        So that a damaged file reads zeros, and never memory that is not the codebook's.
        """
        stages, entries, width = self.codebook.shape
        if entries == 1 << self.code_bits:
            return self.codebook.detach().to(dtype).contiguous()
        table = self.codebook.new_zeros(stages, 1 << self.code_bits, width, dtype=dtype)
        table[:, :entries] = self.codebook.detach()
        return table


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Bytes as codes -> int32 [rows, count]. packed: uint8 [rows, ceil(count * bits / 8)]."""
    if bits == 8:
        return packed.int()
    many, size = WORDS[bits]
    groups = torch.nn.functional.pad(packed, (0, -packed.shape[1] % size)).int().unflatten(1, (-1, size))
    word = groups[..., 0].clone()
    for place in range(1, size):
        word |= groups[..., place] << (8 * place)
    codes = torch.empty(*word.shape, many, dtype=torch.int32, device=packed.device)
    for place in range(many):
        codes[..., place] = (word >> (place * bits)) & ((1 << bits) - 1)
    return codes.flatten(1)[:, :count]


def decode_into(weight: Weight, table: Tensor, rows: slice, out: Tensor) -> Tensor:
    """Rows from codes and scales alone -> `out` [rows, I], overwritten, in its dtype, which is that of `table`."""
    codes = unpack(weight.codes[rows], weight.code_bits, weight.codes_per_row).unflatten(1, (table.shape[0], -1))
    view = out.view(-1, table.shape[2])
    torch.index_select(table[0], 0, codes[:, 0].flatten(), out=view)
    for stage in range(1, table.shape[0]):
        view += table[stage].index_select(0, codes[:, stage].flatten())
    return out.mul_(weight.row_scale[rows].detach().to(out.dtype).unsqueeze(1))


def decode_bytes(weight: Weight, itemsize: int) -> int:
    """What `decode_into` allocates for one row beside `out`, at the most: codes four times as int32, a second stage."""
    second = weight.inputs * itemsize if weight.codebook.shape[0] > 1 else 0
    return 16 * weight.codes_per_row + second


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The whole weight, low-rank part included -> [O, I] in rotated inputs; differentiable by scales and codebook."""
    book = weight.codebook.to(dtype)
    spare = (1 << weight.code_bits) - book.shape[1]
    book = torch.nn.functional.pad(book, (0, 0, 0, spare))
    codes = unpack(weight.codes, weight.code_bits, weight.codes_per_row).unflatten(1, (book.shape[0], -1))
    result = sum(book[stage][codes[:, stage].long()] for stage in range(book.shape[0]))
    assert isinstance(result, Tensor)
    result = result.flatten(1) * weight.row_scale.to(dtype).unsqueeze(1)
    if weight.low_rank is not None:
        result = result + weight.low_rank[1].to(dtype) @ weight.low_rank[0].to(dtype)
    return result


def rotate(x: Tensor, signs: Tensor | None, block: int) -> Tensor:
    """Activations in rotated inputs -> as x [..., I]. signs: packed uint8 [ceil(I / 8)], or None for x itself."""
    return x if signs is None else hadamard(x * unpack_signs(signs, x.shape[-1], x.dtype), block)


def unrotate(x: Tensor, signs: Tensor | None, block: int) -> Tensor:
    """The inverse of `rotate`, which is also its transpose -> as x [..., I]."""
    return x if signs is None else hadamard(x, block) * unpack_signs(signs, x.shape[-1], x.dtype)


def unpack_signs(packed: Tensor, inputs: int, dtype: torch.dtype) -> Tensor:
    """Signs as numbers -> [I] of 1 and -1; bit i % 8 of byte i // 8 is set for -1."""
    bits = (packed.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return 1 - 2 * bits.flatten()[:inputs].to(dtype)


def hadamard(x: Tensor, block: int) -> Tensor:
    """Orthonormal Walsh-Hadamard transform of each block of the last dimension -> as x [..., I].

    H of p * q is H of p (x) H of q: factors of at most 32 one after the other, as small matrix products.
    """
    right = min(block, 32)
    if right <= 1:
        return x
    parts = x.reshape(-1, right) @ hadamard_matrix(right, x.dtype, x.device)
    left = block // right
    while left > 1:
        size = min(left, 32)
        parts = hadamard_matrix(size, x.dtype, x.device) @ parts.reshape(-1, size, right)
        left, right = left // size, right * size
    return parts.reshape(x.shape)


@functools.cache
def hadamard_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Orthonormal Sylvester Hadamard matrix -> [size, size]."""
    with torch.inference_mode(False):  # kept, so it must also serve calls outside inference mode
        matrix = torch.ones(1, 1, dtype=torch.float64)
        while matrix.shape[0] < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        return (matrix / size**0.5).to(dtype).to(device)
