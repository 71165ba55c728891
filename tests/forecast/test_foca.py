"""FoCa: slopes of second order on uneven anchors, straight lines continued, and an end to the horizon."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from dit_accel.forecast import Forecast
from dit_accel.forecast.foca import HORIZON, bdf2_slope, foca_weights
from dit_accel.forecast.predictors import weights_for

NODES = [[3.0], [0.0, 5.0], [0.0, 1.0, 4.0], [0.0, 3.0, 6.0], [-2.5, -1.0, 0.5], [0.0, 1.0, 2.0, 7.0]]
SIGMAS = [[1.0, 0.93], [1.0, 0.97, 0.6]]  # the noise level falls


def value(weights: Sequence[float], u: Sequence[float], f: Callable[[float], float]) -> float:
    return sum(w * f(node) for w, node in zip(weights, u, strict=True))


@pytest.mark.parametrize("u", NODES + SIGMAS)
@pytest.mark.parametrize("horizon", [None, HORIZON])
def test_weights_sum_to_one(u: list[float], horizon: float | None) -> None:
    for v in (u[-1] + 1, u[-1] - 0.25, u[-1] + 9):
        assert sum(foca_weights(u, v, horizon)) == pytest.approx(1.0)
        assert value(foca_weights(u, v, horizon), u, lambda t: 7.0) == pytest.approx(7.0)


@pytest.mark.parametrize("u", [nodes for nodes in NODES + SIGMAS if len(nodes) > 1])
def test_a_straight_line_is_continued_straight(u: list[float]) -> None:
    for v in (u[-1] + 2, u[-1] - 0.25):
        assert value(foca_weights(u, v), u, lambda t: 3 * t - 2) == pytest.approx(3 * v - 2)


def test_one_anchor_is_reused() -> None:
    assert bdf2_slope([4.0]) == [0.0]
    assert foca_weights([4.0], 9.0) == [1.0]


def test_two_anchors_have_the_slope_between_them() -> None:
    assert bdf2_slope([1.0, 5.0]) == [-0.25, 0.25]
    assert foca_weights([1.0, 5.0], 7.0) == [-0.5, 1.5]


def test_the_slope_of_a_square_by_hand() -> None:
    # gaps 1 and 3: (2 * 3 + 1) / (3 * 4), -4 / (3 * 1), 3 / (1 * 4); of 0, 1, 16 that is 28/3 - 4/3 = 8 = 2 * 4
    assert bdf2_slope([0.0, 1.0, 4.0]) == pytest.approx([3 / 4, -4 / 3, 7 / 12])
    assert value(bdf2_slope([0.0, 1.0, 4.0]), [0.0, 1.0, 4.0], lambda t: t * t) == pytest.approx(8.0)
    # even gaps have the weights of the textbook: (3, -4, 1) / 2 gaps
    assert bdf2_slope([0.0, 2.0, 4.0]) == pytest.approx([1 / 4, -4 / 4, 3 / 4])


@pytest.mark.parametrize("u", [nodes for nodes in NODES + SIGMAS if len(nodes) > 2])
def test_the_slope_of_a_quadratic_is_exact_on_uneven_anchors(u: list[float]) -> None:
    slope = value(bdf2_slope(u), u, lambda t: 2 * t * t - 5 * t + 1)
    assert slope == pytest.approx(4 * u[-1] - 5)


def test_the_step_follows_the_slope_and_does_not_bend() -> None:
    # of a square at 0, 1, 4 two steps on: 16 + 2 * 8, and not 36
    assert value(foca_weights([0.0, 1.0, 4.0], 6.0), [0.0, 1.0, 4.0], lambda t: t * t) == pytest.approx(32.0)


def test_beyond_the_horizon_the_slope_is_not_followed() -> None:
    u = [0.0, 1.0, 4.0]
    assert foca_weights(u, 7.0, 3.0) == pytest.approx(foca_weights(u, 7.0))
    assert foca_weights(u, 11.0, 3.0) == pytest.approx(foca_weights(u, 7.0))
    assert foca_weights(u, -5.0, 3.0) == pytest.approx(foca_weights(u, 1.0)), "the same in the other direction"


def test_the_horizon_counts_steps_and_no_noise_levels() -> None:
    u = [0.0, 1.0, 4.0]
    assert weights_for(Forecast("foca"), u, 11.0) == pytest.approx(foca_weights(u, 7.0))
    assert weights_for(Forecast("foca", coordinate="sigma"), u, 11.0) == pytest.approx(foca_weights(u, 11.0))
