"""The rotation against its matrix written out; signs by hand; products and Hessians that it leaves alone."""

import pytest
import torch
from torch import Tensor

from dit_accel.errors import ArgumentError, CheckpointError
from dit_accel.weights.rotation import block_of, draw_signs, hadamard, rotate, rotate_hessian, unpack_signs, unrotate


def matrix(block: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Hadamard's matrix by its formula, (-1)^(ones in i & j) / sqrt(block)."""
    rows = [[(-1.0) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
    return torch.tensor(rows, dtype=dtype) / block**0.5


@pytest.mark.parametrize(
    ("inputs", "block"),
    [(1152, 128), (3072, 1024), (4608, 512), (12288, 1024), (15360, 1024), (3840, 256), (2240, 64), (7, 1)],
)
def test_blocks_of_real_widths(inputs: int, block: int) -> None:
    assert block_of(inputs) == block
    assert block_of(inputs, 64) == min(block, 64)


def test_four_inputs_by_hand() -> None:
    assert hadamard(torch.tensor([1.0, 2.0, 3.0, 4.0]), 4).tolist() == [5.0, -1.0, -2.0, 0.0]
    signs = torch.tensor([1.0, -1.0, 1.0, 1.0])
    assert rotate(torch.tensor([[1.0, -2.0, 3.0, 4.0]]), signs, 4).tolist() == [[5.0, -1.0, -2.0, 0.0]]


@pytest.mark.parametrize("block", [1, 2, 8, 32, 64, 256, 1024])
def test_the_transform_is_its_matrix(block: int) -> None:
    x = torch.randn(3, 2 * block, dtype=torch.float64, generator=torch.Generator().manual_seed(block))
    expected = torch.cat([part @ matrix(block) for part in x.split(block, 1)], 1)
    assert torch.allclose(hadamard(x, block), expected, atol=1e-12)
    assert torch.allclose(hadamard(x.view(1, 3, -1), block)[0], expected, atol=1e-12)


@pytest.mark.parametrize("inputs", [24, 96, 2048])
def test_products_norms_and_the_way_back(inputs: int) -> None:
    generator = torch.Generator().manual_seed(3)
    block, signs = block_of(inputs), unpack_signs(draw_signs(inputs, 5), inputs)
    weight, x = torch.randn(7, inputs, generator=generator), torch.randn(2, 5, inputs, generator=generator)
    turned = rotate(weight, signs, block)
    assert torch.allclose(rotate(x, signs, block) @ turned.T, x @ weight.T, atol=2e-4)
    assert torch.allclose(turned.norm(dim=1), weight.norm(dim=1), rtol=1e-5)
    assert torch.allclose(unrotate(turned, signs, block), weight, atol=1e-5)
    assert not torch.allclose(turned, weight, atol=0.5)


def test_the_hessian_of_rotated_inputs() -> None:
    x = torch.randn(40, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    signs = unpack_signs(draw_signs(24, 1), 24)
    turned = rotate(x, signs, 8)
    assert torch.allclose(rotate_hessian(x.T @ x, signs, 8), turned.T @ turned, atol=1e-10)


def test_outliers_are_spread() -> None:
    weight = torch.zeros(1, 1024)
    weight[0, 77] = 32.0
    turned = rotate(weight, unpack_signs(draw_signs(1024, 0), 1024), 1024)
    assert torch.allclose(turned.abs(), torch.ones(1, 1024))


def test_signs_are_bits_and_belong_to_a_seed() -> None:
    packed = torch.tensor([0b101, 0b10], dtype=torch.uint8)
    assert unpack_signs(packed, 10).tolist() == [-1, 1, -1, 1, 1, 1, 1, 1, 1, -1]
    assert draw_signs(20, 0).tolist() == [0x07, 0x2C, 0x08], "Python's generator is the same everywhere"
    assert not torch.equal(draw_signs(4096, 0), draw_signs(4096, 1))
    assert abs(float(unpack_signs(draw_signs(4096, 0), 4096).mean())) < 0.05


def test_what_does_not_fit() -> None:
    with pytest.raises(ArgumentError, match="Blocks of 8 do not fit 12"):
        hadamard(torch.zeros(12), 8)
    with pytest.raises(ArgumentError, match="power of two"):
        hadamard(torch.zeros(12), 3)
    with pytest.raises(ArgumentError, match="No blocks for 0 inputs"):
        block_of(0)
    for bad in (torch.zeros(3, dtype=torch.uint8), torch.zeros(2), torch.zeros(1, 2, dtype=torch.uint8)):
        with pytest.raises(CheckpointError, match="Signs are"):
            unpack_signs(bad, 12)
    with pytest.raises(CheckpointError, match="after the last sign"):
        unpack_signs(torch.tensor([0, 16], dtype=torch.uint8), 12)
