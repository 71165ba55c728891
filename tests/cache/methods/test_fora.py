"""FORA: every N-th step."""

from __future__ import annotations

from dit_accel.cache.methods.fora import PUBLISHED, ForaSettings, decide


def test_every_third_step() -> None:
    assert [step for step in range(10) if decide(ForaSettings(), step)] == [0, 3, 6, 9]


def test_an_interval_of_one_never_skips() -> None:
    assert all(decide(ForaSettings(1), step) for step in range(5))


def test_published_intervals() -> None:
    # 50 steps at 6: 0, 6, ..., 48, so nine are computed
    slow, fast = PUBLISHED["flux"]
    assert sum(decide(slow, step) for step in range(50)) == 17
    assert sum(decide(fast, step) for step in range(50)) == 9
