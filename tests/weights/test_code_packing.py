"""Packed codes: bytes by hand, a stream of bits written out, and what cannot be packed or read."""

import pytest
import torch

from dit_accel.errors import ArgumentError, CheckpointError
from dit_accel.weights.packing import check_packed, pack, packed_length, unpack


@pytest.mark.parametrize(
    ("bits", "codes", "packed"),
    [
        (4, [1, 2, 15], [0x21, 0x0F]),
        (6, [1, 2, 3, 63], [0b10_000001, 0b0011_0000, 0b111111_00]),
        (6, [63], [0x3F]),
        (8, [0, 7, 255], [0, 7, 255]),
        (12, [0xABC, 0x123], [0xBC, 0x3A, 0x12]),
        (12, [0xABC], [0xBC, 0x0A]),
    ],
)
def test_bytes_by_hand(bits: int, codes: list[int], packed: list[int]) -> None:
    made = pack(torch.tensor([codes]), bits)
    assert made.dtype == torch.uint8
    assert made.tolist() == [packed]
    assert unpack(made, bits, len(codes)).tolist() == [codes]


@pytest.mark.parametrize("bits", [4, 6, 8, 12])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 13, 64])
def test_rows_are_streams_of_bits(bits: int, count: int) -> None:
    codes = torch.randint(2**bits, (5, count), generator=torch.Generator().manual_seed(count))
    codes[0], codes[1] = 0, 2**bits - 1
    made = pack(codes, bits)
    assert made.shape == (5, packed_length(count, bits))
    for row, expected in zip(made.tolist(), codes.tolist(), strict=True):
        stream = sum(code << (bits * j) for j, code in enumerate(expected))
        assert bytes(row) == stream.to_bytes(len(row), "little")
    assert torch.equal(unpack(made, bits, count), codes.int())
    check_packed(made, bits, count, 2**bits)


def test_no_rows_and_no_codes() -> None:
    for shape in ((0, 4), (3, 0)):
        made = pack(torch.zeros(shape, dtype=torch.int64), 6)
        assert unpack(made, 6, shape[1]).shape == shape
        check_packed(made, 6, shape[1], 64)


@pytest.mark.parametrize(("bits", "code"), [(4, 16), (6, 64), (8, 256), (12, 4096), (6, -1), (8, -1)])
def test_codes_that_do_not_fit_are_named(bits: int, code: int) -> None:
    with pytest.raises(ArgumentError, match=f"{bits} bits hold 0 to {2**bits - 1}"):
        pack(torch.tensor([[0, code]]), bits)


def test_what_cannot_be_packed() -> None:
    with pytest.raises(ArgumentError, match="give 4, 6, 8 or 12"):
        pack(torch.zeros(1, 1, dtype=torch.int64), 5)
    for codes in (torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.bool)):
        with pytest.raises(ArgumentError, match="give whole numbers"):
            pack(codes, 4)


def test_bytes_of_another_size_or_kind_are_refused() -> None:
    packed = pack(torch.zeros(2, 5, dtype=torch.int64), 6)
    for bad, count in ((packed, 6), (packed, 4), (packed.int(), 5), (packed[0], 5)):
        with pytest.raises(CheckpointError, match="Packed codes are"):
            unpack(bad, 6, count)


def test_damaged_bytes_are_found() -> None:
    packed = pack(torch.tensor([[0, 3], [1, 12]]), 4)
    check_packed(packed, 4, 2, 13)
    with pytest.raises(CheckpointError, match="A code is 12, and the codebook has 12 entries"):
        check_packed(packed, 4, 2, 12)
    spare = pack(torch.tensor([[1], [2]]), 6)
    spare[1, 0] |= 64
    with pytest.raises(CheckpointError, match="bits after a row's last code"):
        check_packed(spare, 6, 1, 64)
