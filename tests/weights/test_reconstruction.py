"""Reconstruction of synthetic 1024 x 1024 weights: no worse than the table that the design was chosen by."""

import functools

import pytest
import torch
from torch import Tensor

from dit_accel.weights.codebook import universal
from dit_accel.weights.encode import data_free
from dit_accel.weights.hessian import output_error
from dit_accel.weights.rotation import draw_signs, rotate, unpack_signs
from dit_accel.weights.scalar import round_to_nearest

SIZE = 1024


@functools.cache
def weight(kind: str) -> Tensor:
    """Gaussian; Student's t of 4 degrees; or Gaussian with row scales and 1 % of the columns six times as large."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(SIZE, SIZE, generator=generator)
    if kind == "tails":
        squares = torch.stack([torch.randn(SIZE, SIZE, generator=generator).square() for _ in range(4)])
        return normal / squares.mean(0).sqrt()
    if kind == "outliers":
        normal[:, torch.randperm(SIZE, generator=generator)[:10]] *= 6
        return normal * torch.exp(0.5 * torch.randn(SIZE, 1, generator=generator))
    return normal


@pytest.mark.parametrize(
    ("name", "gauss", "tails", "outliers"),
    [
        ("256x4", 0.0984, 0.0982, 0.0980),
        ("64x2", 0.0311, 0.0311, 0.0309),
        ("256x2", 0.0095, 0.0091, 0.0093),
        ("256x4+256x4", 0.0108, 0.0108, 0.0107),
    ],
)
def test_universal_codebooks_reach_the_table(name: str, gauss: float, tails: float, outliers: float) -> None:
    signs = unpack_signs(draw_signs(SIZE, 0), SIZE)
    for kind, most in (("gauss", gauss), ("tails", tails), ("outliers", outliers)):
        turned = rotate(weight(kind), signs, SIZE)
        assert output_error(turned, data_free(turned, universal(name)).dense()) < most, kind


@pytest.mark.parametrize(("bits", "name"), [(2, "256x4"), (3, "64x2"), (4, "256x2")])
def test_fewer_bits_than_clipped_rounding_and_less_error(bits: int, name: str) -> None:
    signs = unpack_signs(draw_signs(SIZE, 0), SIZE)
    for kind in ("gauss", "tails", "outliers"):
        turned = rotate(weight(kind), signs, SIZE)
        rounded = output_error(weight(kind), round_to_nearest(weight(kind), bits).dense())
        assert output_error(turned, data_free(turned, universal(name)).dense()) < 0.9 * rounded
