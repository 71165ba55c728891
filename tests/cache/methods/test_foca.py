"""FoCa: a full step in every N after the first ones; its weights are tests/forecast/test_foca.py."""

from __future__ import annotations

from collections.abc import Callable

from dit_accel.cache.methods.foca import PUBLISHED_INTERVALS, cache, forecast

Replay = Callable[..., str]


def test_replay_by_hand(replay: Replay) -> None:
    # three at the start, then four forecasts between full steps: 2 + 5 = 7, 12
    assert replay(cache(), [None] * 15) == "CCC....C....C.."
    assert replay(cache(1), [None] * 5) == "CCCCC"


def test_published_intervals(replay: Replay) -> None:
    # at 8: 2 + 8 = 10, 18, 26, 34, 42
    slow, fast = (replay(cache(interval), [None] * 50) for interval in PUBLISHED_INTERVALS["flux"])
    assert (slow.count("C"), fast.count("C")) == (12, 8)


def test_the_slope_takes_three_anchors() -> None:
    assert (forecast().predictor, forecast().anchors) == ("foca", 3)
    assert cache().warmup == forecast().anchors, "all of them are there before the first forecast"
