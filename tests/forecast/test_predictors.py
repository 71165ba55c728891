"""The table of predictors and the one linear combination behind all of them."""

from __future__ import annotations

import math

import pytest
import torch

from dit_accel.forecast import Forecast
from dit_accel.forecast.predictors import WEIGHTS, combine, weights_for
from dit_accel.forecast.settings import PREDICTORS

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LARGE = [3.0, -8.0, 6.0]  # newton of order 2, two gaps ahead: weights that cancel


def anchors(count: int, dtype: torch.dtype, shape: tuple[int, ...] = (2, 3, 8)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def test_every_predictor_that_can_be_named_has_weights() -> None:
    assert set(WEIGHTS) == set(PREDICTORS)


@pytest.mark.parametrize(
    ("forecast", "weights"),
    [
        (Forecast("reuse", 0), [0, 0, 1]),
        (Forecast("newton", 1), [0, -0.5, 1.5]),
        (Forecast("newton", 2), [0.375, -1.25, 1.875]),
        (Forecast("taylor", 1), [0, -0.5, 1.5]),
        (Forecast("taylor", 2), [0.125, -0.75, 1.625]),
    ],
)
def test_weights_half_a_gap_ahead(forecast: Forecast, weights: list[float]) -> None:
    assert weights_for(forecast, [0, 2, 4], 5) == pytest.approx(weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("weights", [[1.0], [-0.5, 1.5], LARGE, [0.0, -2.0, 3.0]])
def test_combine_equals_float64(weights: list[float], with_base: bool, dtype: torch.dtype) -> None:
    values = anchors(len(weights), dtype)
    base = anchors(5, dtype)[4] if with_base else None
    expected = sum((w * a.double() for w, a in zip(weights, values)), torch.zeros(2, 3, 8, dtype=torch.float64))
    expected = expected if base is None else expected + base.double()
    result = combine(weights, values, base)
    assert result.dtype == dtype
    # One rounding to the dtype and nothing else: half a unit in the last place, of a sum kept in fp32 or wider.
    unit = torch.finfo(dtype).eps / 2
    slack = 0.0 if dtype == torch.float64 else 1e-6
    assert ((result.double() - expected).abs() <= (unit + slack) * expected.abs() + 4 * slack + 1e-14).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_would_be_told_apart(dtype: torch.dtype) -> None:
    """The check above has teeth: the same sum in the dtype itself is off by more than one rounding."""
    values = anchors(3, dtype, (4096,))
    exact = sum((w * a.double() for w, a in zip(LARGE, values)), torch.zeros(4096, dtype=torch.float64))
    narrow = sum((w * a for w, a in zip(LARGE, values)), torch.zeros(4096, dtype=dtype))
    wide = combine(LARGE, values)
    assert (wide.double() - exact).abs().mean() < 0.8 * (narrow.double() - exact).abs().mean()


def test_an_anchor_of_weight_zero_is_not_touched() -> None:
    broken, good = torch.full((2,), math.nan), torch.tensor([1.0, 2.0])
    assert torch.equal(combine([0.0, 1.0], [broken, good]), good)
    assert torch.equal(combine([0.0, 1.0], [broken, good], base=good), 2 * good)


@pytest.mark.parametrize("base", [None, torch.ones(2, 3, 8)])
def test_inputs_are_left_alone(base: torch.Tensor | None) -> None:
    values = anchors(2, torch.float32)
    before = [value.clone() for value in values]
    result = combine([0.0, 1.0], values, base)
    result.add_(1.0)
    assert all(torch.equal(value, copy) for value, copy in zip(values, before))
    assert base is None or torch.equal(base, torch.ones(2, 3, 8))


def test_empty_features_stay_empty() -> None:
    empty = torch.zeros(2, 0, 8)
    assert combine([-1.0, 2.0], [empty, empty], empty).shape == (2, 0, 8)
