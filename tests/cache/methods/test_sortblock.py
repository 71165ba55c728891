"""Sortblock: window and count, worked out by hand; share and ranking are tests/cache/test_ranking.py."""

from __future__ import annotations

from collections.abc import Callable

from dit_accel.cache import Ranking
from dit_accel.cache.methods.sortblock import WAN_COEFFICIENTS, cache, forecast

Replay = Callable[..., str]


def test_replay_by_hand(replay: Replay) -> None:
    # 950 lies before the window; 900 800 700 forecast (all blocks at 900, at 800 and 700 but for the chosen ones), 600
    # full, 500 400 forecast; 99 and 98 lie behind it. A step outside counts as the full one, so the three forecasts
    # begin at once: with a count that starts anew inside, 900 and 500 would be full: CC...C.CC
    times = [950.0, 900.0, 800.0, 700.0, 600.0, 500.0, 400.0, 99.0, 98.0]
    assert replay(cache(4, start=900.0, end=100.0), [None] * 9, times=times) == "C...C..CC"


def test_the_first_step_is_full_inside_the_window_too(replay: Replay) -> None:
    times = [1000.0 - 100 * step for step in range(9)]
    assert replay(cache(4, start=1000.0, end=0.0), [None] * 9, times=times) == "C...C...C"


def test_an_interval_of_one_is_always_full(replay: Replay) -> None:
    assert replay(cache(1, start=1000.0, end=0.0), [None] * 3, times=[900.0, 500.0, 100.0]) == "CCC"


def test_blocks_are_ranked_one_by_one() -> None:
    wan = cache(5, 0.7, WAN_COEFFICIENTS)
    assert wan.ranking == Ranking(WAN_COEFFICIENTS, 0.7)
    assert (wan.scope.unit, wan.scope.carrier) == ("block", "residual")
    assert (forecast().predictor, forecast().anchors) == ("newton", 2)
