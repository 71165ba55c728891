"""TaylorSeer: full steps of the published code, and the forecast of a straight line."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dit_accel.cache import BlockCache
from dit_accel.cache.methods.taylorseer import PUBLISHED, cache, forecast
from dit_accel.forecast.predictors import weights_for

Replay = Callable[..., str]


def full_steps(replay: Replay, rule: BlockCache, steps: int) -> list[int]:
    return [step for step, mark in enumerate(replay(rule, [None] * steps)) if mark == "C"]


def test_full_steps_of_the_published_code(replay: Replay) -> None:
    # three at the start, then five forecasts between full steps: 2 + 6 = 8, 14, ...
    assert full_steps(replay, cache(*PUBLISHED["flux"][:2]), 28) == [0, 1, 2, 8, 14, 20, 26]
    assert full_steps(replay, cache(*PUBLISHED["wan2.1"][:2]), 12) == [0, 5, 10]
    assert full_steps(replay, cache(*PUBLISHED["dit-xl"][:2]), 9) == [0, 1, 4, 7]
    assert full_steps(replay, cache(1, first=1), 5) == [0, 1, 2, 3, 4]
    assert full_steps(replay, cache(3, first=0), 7) == [0, 3, 6], "nothing to forecast from at the first step"


def test_as_many_anchors_as_the_order_can_use() -> None:
    assert [forecast(order).anchors for _, _, order in PUBLISHED.values()] == [2, 2, 2, 2, 4, 4]


def test_a_line_is_forecast_exactly() -> None:
    # 3 + 2 t at 2 and 8 is 7 and 19; at 11 it is 25
    before, newest = weights_for(forecast(), [2.0, 8.0], 11.0)
    assert before * 7 + newest * 19 == pytest.approx(25.0)
    # order 2 on t^2 at 0, 3, 6, asked at 8, as published: D1 = 9, D2 = (9 - 3) / 3 = 2; 36 + 9 * 2 + 2 * 4 / 2 = 58
    weights = weights_for(forecast(2), [0.0, 3.0, 6.0], 8.0)
    assert sum(w * t * t for w, t in zip(weights, (0, 3, 6))) == pytest.approx(58.0)
    assert weights_for(forecast(), [5.0], 7.0) == [1.0]


def test_the_lite_form_forecasts_the_last_output_alone() -> None:
    assert (cache().scope.unit, cache(lite=True).scope.unit) == ("layers", "model")
    assert cache(lite=True).scope.carrier == "output"
