"""CG-Taylor: the gate on the first block's forecast, and the weights of both forecasts, worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from dit_accel.cache.gate import GateState, decide
from dit_accel.cache.methods.cg_taylor import PUBLISHED, cache, forecast
from dit_accel.forecast.predictors import weights_for

Replay = Callable[..., str]


def test_replay_by_hand(replay: Replay) -> None:
    # five steps of warm-up (cnt > 4); errors are not summed: .1 .12 pass .13, .13 does not; the last is computed
    errors = [None, 0.0, 0.0, 0.0, 0.0, 0.1, 0.12, 0.13, 0.05, 0.0]
    assert replay(cache(*PUBLISHED["flux-fast"]), errors) == "CCCCC..C.C"
    assert replay(cache(*PUBLISHED["flux"]), errors) == "CCCCCCCCCC"
    assert replay(cache(0.0, first=1), [None, 0.0, 0.0, 0.0]) == "CCCC"


@pytest.mark.parametrize("error", [math.nan, math.inf, None])
def test_what_is_not_finite_computes(error: float | None) -> None:
    assert decide(cache(9.0, first=1), GateState(computed=4), error, 5, 20).compute


def test_the_first_step_computes_whatever_the_threshold(replay: Replay) -> None:
    assert replay(cache(9.0, first=1), [0.0] * 5) == "C...C"


def test_the_other_branch_does_the_same() -> None:
    assert cache().branches == "first"


def test_the_first_block_has_an_order_of_its_own() -> None:
    threshold, first, order = PUBLISHED["wan2.1"]
    wan, last_block = cache(threshold, first, order), forecast()
    assert (wan.signal.forecast_order, last_block.order, last_block.anchors) == (3, 1, 2)
    # order 1 from 4 and 5, asked at 7: -2 and 3
    assert weights_for(last_block, [4.0, 5.0], 7.0) == pytest.approx([-2.0, 3.0])
    # order 3 from 2 to 5: still 1 of a constant, and 7 of the straight line that is t at t
    weights = weights_for(last_block, [2.0, 3.0, 4.0, 5.0], 7.0, order=wan.signal.forecast_order)
    assert sum(weights) == pytest.approx(1.0)
    assert sum(w * t for w, t in zip(weights, (2, 3, 4, 5))) == pytest.approx(7.0)
