"""HiCache: TaylorSeer's schedule; its weights are tests/forecast/test_hermite.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dit_accel.cache.methods import taylorseer
from dit_accel.cache.methods.hicache import cache, forecast
from dit_accel.forecast.predictors import weights_for

Replay = Callable[..., str]


def test_replay_by_hand(replay: Replay) -> None:
    # three at the start, then five forecasts between full steps: 2 + 6 = 8, 14
    assert replay(cache(), [None] * 16) == "CCC.....C.....C."
    assert replay(cache(3, first=1), [None] * 8) == "C..C..C."
    assert cache(4, 2) == taylorseer.cache(4, 2)


def test_the_published_scale_halves_the_slope() -> None:
    assert (forecast().order, forecast().scale, forecast().anchors) == (2, 0.5, 3)
    # of the series 1, 5 at 0, 2 the slope is 2; one step on it is 5 + .5 * 2
    before, newest = weights_for(forecast(order=1), [0.0, 2.0], 3.0)
    assert before * 1 + newest * 5 == pytest.approx(6.0)
