"""Weights of every predictor: exactness, signs, and the published TaylorSeer recursion done again."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from fractions import Fraction

import pytest

from dit_accel.forecast.hermite import hermite_weights
from dit_accel.forecast.weights import damped_weights, newton_weights, reuse_weights, taylor_weights

Predictor = Callable[[Sequence[float], float, int], list[float]]
EVERY = [reuse_weights, newton_weights, taylor_weights, hermite_weights]
NODES = [[0], [3], [0, 1], [0, 5], [0, 1, 2], [0, 1, 4], [0, 3, 6, 9], [0, 1, 2, 3, 8], [-2.5, -1, 7, 7.25]]
SIGMAS = [[1.0, 0.93], [1.0, 0.97, 0.6], [0.99, 0.7, 0.69, 0.2]]  # the noise level falls


def forecast(predictor: Predictor, u: Sequence[float], v: float, order: int, f: Callable[[float], float]) -> float:
    return sum(w * f(node) for w, node in zip(predictor(u, v, order), u, strict=True))


@pytest.mark.parametrize("predictor", EVERY)
@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("u", NODES + SIGMAS)
def test_weights_sum_to_one_and_keep_a_constant(predictor: Predictor, order: int, u: list[float]) -> None:
    for v in (u[-1] + 1, u[-1] + 0.25, u[-1] - 0.1, 11.0):
        weights = predictor(u, v, order)
        assert len(weights) == len(u)
        assert sum(weights) == pytest.approx(1.0, abs=1e-9 * sum(abs(w) for w in weights))


@pytest.mark.parametrize("predictor", [newton_weights, taylor_weights])
@pytest.mark.parametrize("u", [nodes for nodes in NODES + SIGMAS if len(nodes) > 1])
def test_order_one_is_exact_on_lines(predictor: Predictor, u: list[float]) -> None:
    for v in (u[-1] + 2, u[-1] - 0.25):
        assert forecast(predictor, u, v, 1, lambda t: 3 * t - 2) == pytest.approx(3 * v - 2)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("u", [nodes for nodes in NODES + SIGMAS if len(nodes) > 2])
def test_newton_is_exact_on_quadratics_at_uneven_nodes(u: list[float], order: int) -> None:
    for v in (u[-1] + 2, u[-1] - 0.25):
        assert forecast(newton_weights, u, v, order, lambda t: 2 * t * t - t + 5) == pytest.approx(2 * v * v - v + 5)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("u", [nodes for nodes in NODES if len(nodes) > 2])
def test_taylor_of_higher_order_is_exact_on_lines_at_even_nodes_only(u: list[float], order: int) -> None:
    line = forecast(taylor_weights, u, u[-1] + 2, order, lambda t: 3 * t - 2)
    assert line == pytest.approx(3 * (u[-1] + 2) - 2)


@pytest.mark.parametrize(
    ("predictor", "u", "v", "order", "value"),
    [
        (newton_weights, [0, 3, 6, 9], 11, 2, 121),
        (taylor_weights, [0, 3, 6, 9], 11, 1, 111),
        (taylor_weights, [0, 3, 6, 9], 11, 2, 115),
        (taylor_weights, [0, 3, 6, 9], 11, 3, 115),
        (newton_weights, [0, 1, 2, 3, 8], 12, 2, 144),
        (taylor_weights, [0, 1, 2, 3, 8], 12, 1, 108),
        (taylor_weights, [0, 1, 2, 3, 8], 12, 2, 117.6),
        (reuse_weights, [0, 3, 6, 9], 11, 0, 81),
        (newton_weights, [0, 3, 6, 9], 11, 0, 81),
        (taylor_weights, [0, 3, 6, 9], 11, 0, 81),
    ],
)
def test_forecasts_of_the_square(predictor: Predictor, u: list[float], v: float, order: int, value: float) -> None:
    """research/caching-and-forecasting.md 1.11: TaylorSeer is not exact on a quadratic, Newton is."""
    assert forecast(predictor, u, v, order, lambda t: t * t) == pytest.approx(value)


@pytest.mark.parametrize("predictor", [newton_weights, taylor_weights])
@pytest.mark.parametrize("gap", [1, 3])
@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_a_rising_series_is_continued_upwards(predictor: Predictor, gap: int, ahead: int) -> None:
    """The sign: k steps behind the last anchor, not before it."""
    newest, oldest = 1 + ahead / gap, -ahead / gap
    assert predictor([0, gap], gap + ahead, 1) == pytest.approx([oldest, newest])


@pytest.mark.parametrize("predictor", [newton_weights, taylor_weights])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_order_falls_to_what_the_anchors_allow(predictor: Predictor, order: int) -> None:
    assert predictor([4], 9, order) == [1.0]
    assert predictor([1, 4], 9, order) == pytest.approx(predictor([1, 4], 9, 1))


def test_newton_looks_at_the_newest_anchors_only() -> None:
    assert newton_weights([0, 1, 2, 5], 6, 1) == pytest.approx([0, 0, -1 / 3, 4 / 3])
    assert newton_weights([0, 1, 2, 5], 6, 0) == [0, 0, 0, 1]


def test_reuse_takes_the_newest_whatever_is_asked() -> None:
    assert reuse_weights([0, 1, 7], 9, 2) == reuse_weights([0, 1, 7], -9) == [0, 0, 1]


def test_at_an_anchor_newton_returns_it() -> None:
    assert newton_weights([0, 1, 4], 1, 2) == pytest.approx([0, 1, 0])


def taylorseer(times: Sequence[float], values: Sequence[float], v: float, order: int) -> float:
    """The published code: D_0 = F; D_{k+1} = (D_k - old D_k) / gap where an old D_k exists; sum D_k x^k / k!."""
    old: list[Fraction] = []
    for n, value in enumerate(values):
        new = [Fraction(value)]
        for k in range(order):
            if n > 0 and k < len(old):
                new.append((new[k] - old[k]) / (Fraction(times[n]) - Fraction(times[n - 1])))
        old = new
    x = Fraction(v) - Fraction(times[-1])
    return float(sum(d * x**k / math.factorial(k) for k, d in enumerate(old)))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("order", [0, 1, 2, 3, 4])
def test_taylor_equals_the_published_recursion(order: int, seed: int) -> None:
    rng = random.Random(seed)
    times = [0.0]
    for _ in range(rng.randrange(6)):
        times.append(times[-1] + rng.choice([1, 1, 2, 5, 0.5]))
    values = [rng.uniform(-1, 1) for _ in times]
    v = times[-1] + rng.choice([1, 2, 3])
    result = sum(w * value for w, value in zip(taylor_weights(times, v, order), values, strict=True))
    assert result == pytest.approx(taylorseer(times, values, v, order), rel=1e-9, abs=1e-9)


def test_damping_lies_between_two_orders() -> None:
    u, v = [0.0, 1.0, 4.0], 6.0
    high, low = newton_weights(u, v, 2), newton_weights(u, v, 1)
    assert damped_weights(u, v, 2, 0.0) == high
    assert damped_weights(u, v, 2, 1.0) == pytest.approx(low)
    assert damped_weights(u, v, 2, 0.25) == pytest.approx([0.75 * a + 0.25 * b for a, b in zip(high, low)])
    assert damped_weights([5.0], 6.0, 2, 0.5) == [1.0], "one anchor has no difference to damp"
