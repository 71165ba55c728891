"""PAB: one of N steps inside the window, all of them outside, worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

from dit_accel.cache.methods.pab import cache

Replay = Callable[..., str]

TIMES = [950.0, 850.0, 750.0, 650.0, 550.0, 450.0, 350.0, 250.0, 150.0, 50.0]


def test_replay_by_hand(replay: Replay) -> None:
    # 950, 850 and 50 lie outside of 800 ... 100; inside the even steps are computed, counted from the start of the run
    assert replay(cache(), [None] * 10, times=TIMES) == "CCC.C.C.CC"


def test_an_interval_of_three(replay: Replay) -> None:
    # inside the window 3 and 6 are computed
    assert replay(cache(3), [None] * 10, times=TIMES) == "CC.C..C..C"
    assert replay(cache(1), [None] * 10, times=TIMES) == "C" * 10


def test_a_time_that_is_not_known_lies_outside(replay: Replay) -> None:
    assert replay(cache(), [None] * 6) == "C" * 6


def test_attention_alone_is_reused() -> None:
    assert cache().scope.skips_layer("attention") and not cache().scope.skips_layer("mlp")
