"""Row-packed codes of 4, 6, 8 or 12 bits (the storage of VQ4DiT 2408.17131 at 2 to 4 bits a weight): exact, both ways.

Each row is a stream of bits of its own: code j takes bits j * bits to (j + 1) * bits - 1, and bit b is bit b % 8 of
byte b // 8. So the lower half of a byte comes first, 4 codes of 6 bits fill 3 bytes, and 2 of 12 bits fill 3. What is
left of a row's last byte is zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.errors import ArgumentError, CheckpointError

BITS = (4, 6, 8, 12)
_WORDS = {4: (2, 1), 6: (4, 3), 8: (1, 1), 12: (2, 3)}  # bits: codes and bytes of the smallest whole number of bytes


def packed_length(count: int, bits: int) -> int:
    """Bytes of a row of so many codes: ceil(count * bits / 8)."""
    if bits not in BITS:
        raise ArgumentError(f"Codes of {bits} bits cannot be packed; give 4, 6, 8 or 12.")
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes as bytes -> uint8 [O, ceil(n * bits / 8)]. codes: whole numbers [O, n], each 0 to 2 ** bits - 1."""
    length = packed_length(codes.shape[-1], bits)
    if codes.ndim != 2 or codes.dtype.is_floating_point or codes.dtype == torch.bool:
        raise ArgumentError(f"Codes are {codes.dtype} of shape {list(codes.shape)}; give whole numbers [rows, codes].")
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 2**bits:
        raise ArgumentError(
            f"Codes run from {int(codes.min())} to {int(codes.max())}; {bits} bits hold 0 to {2**bits - 1}."
        )
    if bits == 8:
        return codes.to(torch.uint8)
    many, size = _WORDS[bits]
    spare = -codes.shape[1] % many
    groups = torch.nn.functional.pad(codes.to(torch.int32), (0, spare)).unflatten(1, (-1, many))
    word = groups[..., 0].clone()
    for place in range(1, many):
        word |= groups[..., place] << (place * bits)
    parts = [(word >> (8 * place)) & 255 for place in range(size)]
    return torch.stack(parts, -1).to(torch.uint8).flatten(1)[:, :length].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Bytes as codes -> int32 [O, count]. packed: uint8 [O, ceil(count * bits / 8)]."""
    length = packed_length(count, bits)
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] != length:
        raise CheckpointError(
            f"Packed codes are {packed.dtype} of shape {list(packed.shape)}; {count} codes of {bits} bits in a row are "
            f"torch.uint8 of shape [rows, {length}]."
        )
    if bits == 8:
        return packed.to(torch.int32)
    many, size = _WORDS[bits]
    spare = -length % size
    groups = torch.nn.functional.pad(packed, (0, spare)).to(torch.int32).unflatten(1, (-1, size))
    word = groups[..., 0].clone()
    for place in range(1, size):
        word |= groups[..., place] << (8 * place)
    parts = [(word >> (place * bits)) & (2**bits - 1) for place in range(many)]
    return torch.stack(parts, -1).flatten(1)[:, :count].contiguous()


def check_packed(packed: Tensor, bits: int, count: int, entries: int) -> None:
    """Raise `CheckpointError` unless these bytes are `count` codes a row, each below `entries`, and zeros after them.

    packed: uint8 [O, ceil(count * bits / 8)].
    """
    unpack(packed[:1], bits, count)  # checks dtype and shape
    if not packed.numel():
        return
    can_exceed = entries < 2**bits
    largest = max(int(unpack(rows, bits, count).max()) for rows in packed.split(1024)) if can_exceed else 0
    if largest >= entries:
        raise CheckpointError(f"A code is {largest}, and the codebook has {entries} entries; the file is damaged.")
    used = count * bits % 8
    if used and int((packed[:, -1] >> used).max()):
        raise CheckpointError("The bits after a row's last code are not zero; the file is damaged or of another shape.")
