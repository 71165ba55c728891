"""FORA: every N-th step."""

from __future__ import annotations

from collections.abc import Callable

from dit_accel.cache.methods.fora import PUBLISHED_INTERVALS, cache

Replay = Callable[..., str]


def test_every_third_step(replay: Replay) -> None:
    assert replay(cache(), [None] * 10) == "C..C..C..C"


def test_an_interval_of_one_never_skips(replay: Replay) -> None:
    assert replay(cache(1), [None] * 5) == "CCCCC"


def test_published_intervals(replay: Replay) -> None:
    # 50 steps at 6: 0, 6, ..., 48, so nine are computed
    slow, fast = (replay(cache(interval), [None] * 50) for interval in PUBLISHED_INTERVALS["flux"])
    assert (slow.count("C"), fast.count("C")) == (17, 9)


def test_both_layers_of_every_block_are_reused() -> None:
    assert cache().scope.skips_layer("attention") and cache().scope.skips_layer("mlp")
