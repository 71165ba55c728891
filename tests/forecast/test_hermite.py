"""Hermite: shrinks as published, is TaylorSeer's line at the scale where nothing shrinks, and looks forwards."""

import math

import pytest

from dit_accel.forecast.hermite import hermite_weights
from dit_accel.forecast.weights import newton_weights, taylor_weights

U = [0.0, 2.0, 4.0]


def value(weights: list[float]) -> float:
    """Of the series 1, 5, 11 at steps 0, 2, 4: slopes 2 and 3, second difference (3 - 2) / 2."""
    return sum(w * f for w, f in zip(weights, (1.0, 5.0, 11.0)))


def test_published_scale_halves_the_slope() -> None:
    assert value(hermite_weights(U, 5.0, 1)) == pytest.approx(11 + 0.5 * 3 * 1)


def test_second_degree_by_hand() -> None:
    # s = 0.5, x = 2: s H_1(1) = 0.5 * 2 = 1, s^2 H_2(1) = 0.25 * (4 - 2) = 0.5; 11 + 3 * 1 + 0.5 * 0.5 / 2
    assert value(hermite_weights(U, 6.0, 2)) == pytest.approx(11 + 3 + 0.125)


def test_nothing_is_lost_of_a_line_at_the_neutral_scale() -> None:
    assert hermite_weights(U, 7.0, 1, math.sqrt(0.5)) == pytest.approx(taylor_weights(U, 7.0, 1))
    assert hermite_weights(U, 7.0, 1, math.sqrt(0.5)) == pytest.approx(newton_weights(U, 7.0, 1))


def test_a_rising_series_is_forecast_to_rise() -> None:
    """HiCache++ reports a port that looked backwards and passed every end-to-end test."""
    assert value(hermite_weights(U, 6.0, 1)) > 11 > value(hermite_weights(U, 2.0, 1))
