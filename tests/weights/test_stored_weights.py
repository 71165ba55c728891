"""Stored weights: the bytes, the way back bit for bit, and every kind of damage in one sentence."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_accel.errors import ArgumentError, CheckpointError
from dit_accel.weights.codebook import UNIVERSAL, universal
from dit_accel.weights.encode import Encoded, data_free, layer_codebook
from dit_accel.weights.feedback import low_rank
from dit_accel.weights.rotation import block_of, draw_signs, rotate, unpack_signs, unrotate
from dit_accel.weights.storage import Stored, store, stored_bytes


def drawn(outputs: int, inputs: int) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1)) * 0.02


def made(name: str = "256x4", outputs: int = 12, inputs: int = 96, rank: int = 0) -> tuple[Tensor, Encoded, Tensor]:
    """A weight, its codes in rotated inputs, and the packed signs."""
    weight, packed = drawn(outputs, inputs), draw_signs(inputs, 7)
    turned = rotate(weight, unpack_signs(packed, inputs), block_of(inputs))
    found = data_free(turned, universal(name))
    if rank:
        found = dataclasses.replace(found, low_rank=low_rank(turned - found.core(), torch.eye(inputs), rank))
    return weight, found, packed


@pytest.mark.parametrize("name", UNIVERSAL)
@pytest.mark.parametrize("rank", [0, 2])
def test_there_and_back_bit_for_bit(name: str, rank: int) -> None:
    weight, found, packed = made(name, rank=rank)
    stored = store(found, universal_name=name, signs=packed)
    signs = unpack_signs(packed, 96)
    assert torch.equal(stored.decode(), unrotate(found.dense(), signs, 32))
    for rows in (slice(0, 5), slice(5, 12), slice(11, 12)):
        assert torch.allclose(stored.decode(rows), stored.decode()[rows], atol=1e-7)
        out = torch.full((rows.stop - rows.start, 96), torch.nan)
        assert stored.rows_into(rows, out) is out
        assert torch.equal(out, found.core()[rows])
    assert float((stored.decode() - weight).square().mean() / weight.square().mean()) < 0.11
    half = torch.empty(12, 96, dtype=torch.bfloat16)
    assert torch.allclose(stored.rows_into(slice(None), half).float(), found.core(), atol=1e-3)


@pytest.mark.parametrize("name", UNIVERSAL)
def test_bits_by_hand(name: str) -> None:
    _, found, packed = made(name, 8, 128, rank=3)
    stored = store(found, universal_name=name, signs=packed)
    codes = 8 * 128 * UNIVERSAL[name] // 8
    assert stored.codes.numel() == codes
    assert stored.nbytes == codes + 2 * 8 + 128 // 8 + 2 * 3 * (8 + 128)
    assert stored.bits_per_weight == pytest.approx(8 * stored.nbytes / 1024)
    count = stored.codes.shape[1] * 8 // stored.bits
    assert stored_bytes((8, 128), stored.bits, count, rotated=True, rank=3) == stored.nbytes
    # As in the research table: 2.02 for 2 bits with a scale a row, 2.03 with signs.
    assert 8 * stored_bytes((1024, 1024), 8, 256, rotated=True) / 2**20 == pytest.approx(2.0166, abs=1e-4)


def test_a_codebook_of_the_layer_is_stored_with_it() -> None:
    weight = drawn(40, 64)
    found = data_free(weight, layer_codebook(weight, 16, 2))
    stored = store(found)
    assert stored.bits == 4
    assert torch.equal(stored.decode(), found.dense())
    assert stored.nbytes == 40 * 16 + 2 * 40 + 2 * 16 * 2
    for dtype in (torch.bfloat16, torch.float32):  # a whole model is cast
        cast = {name: getattr(stored, name).to(dtype) for name in ("row_scale", "codebook")}
        assert torch.equal(dataclasses.replace(stored, **cast).decode(), stored.decode())
    large = dataclasses.replace(found, codebook=torch.zeros(1, 300, 2))
    assert store(large).bits == 12
    with pytest.raises(ArgumentError, match="4096 at most"):
        store(dataclasses.replace(found, codebook=torch.zeros(1, 5000, 2)))
    with pytest.raises(ArgumentError, match="not the universal '256x2'"):
        store(found, universal_name="256x2")


def test_a_block_that_is_not_the_largest() -> None:
    weight, packed = drawn(8, 64), draw_signs(64, 0)
    found = data_free(rotate(weight, unpack_signs(packed, 64), 16), universal("256x4"))
    error = [float((store(found, signs=packed, block=b).decode() - weight).square().mean()) for b in (16, 0)]
    assert error[0] < 0.15 * 0.02**2 < error[1]


def damaged(**changes: Callable[[Any], Any]) -> Stored:
    _, found, packed = made(rank=2)
    stored = store(found, universal_name="256x4", signs=packed)
    return dataclasses.replace(stored, **{name: change(getattr(stored, name)) for name, change in changes.items()})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": lambda _: 5}, "4, 6, 8 and 12 can be read"),
        ({"bits": lambda _: 12}, "Packed codes are"),
        ({"codes": lambda x: x[:, :-1]}, "Packed codes are"),
        ({"codes": lambda x: x[:-1]}, "12 outputs have a row each"),
        ({"codes": lambda x: x.int()}, "Packed codes are"),
        ({"codes": lambda x: x.flatten()}, "12 outputs have a row each"),
        ({"codebook": lambda _: "256x5"}, "There is no universal codebook"),
        ({"codebook": lambda _: torch.zeros(1, 8, 4)}, "the codebook has 8 entries"),
        ({"codebook": lambda _: torch.zeros(1, 256, 5)}, "codebook has shape"),
        ({"codebook": lambda _: torch.zeros(256, 4)}, "codebook has shape"),
        ({"codebook": lambda _: torch.zeros(0, 256, 4)}, "codebook has shape"),
        ({"codebook": lambda _: torch.zeros(1, 256, 4, dtype=torch.int8)}, "codebook is torch.int8"),
        ({"codebook": lambda _: torch.full((1, 256, 4), torch.inf)}, "codebook holds NaN"),
        ({"row_scale": lambda x: x[1:]}, r"row_scale is .* of shape \[12\]"),
        ({"row_scale": lambda x: x.int()}, "row_scale is torch.int32"),
        ({"row_scale": lambda x: x * torch.nan}, "row_scale holds NaN"),
        ({"signs": lambda x: x[1:]}, "Signs are"),
        ({"signs": lambda x: x.float()}, "Signs are"),
        ({"low_rank": lambda x: (x[0], x[1][:, :1])}, "second factor"),
        ({"low_rank": lambda x: (x[0][:, 1:], x[1])}, "first factor"),
        ({"low_rank": lambda x: (x[0] / 0, x[1])}, "first factor holds NaN"),
        ({"shape": lambda _: (12, 48)}, "Packed codes are"),
        ({"shape": lambda _: (12, 98)}, "codebook has shape"),
        ({"block": lambda _: 64}, "block is 64"),
        ({"block": lambda _: 12}, "block is 12"),
    ],
)
def test_damage_is_one_clear_sentence(changes: dict[str, Callable[[Any], Any]], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        damaged(**changes)
