"""Steps that are computed whatever the indicator says."""

from __future__ import annotations

import pytest

from dit_accel.cache import BlockCache
from dit_accel.cache.schedule import must_compute

CACHE = BlockCache(warmup=3, tail=2, max_skips=4)


@pytest.mark.parametrize(
    ("seen", "remaining", "skips", "reason"),
    [
        (0, 50, 0, "warm-up"),
        (2, 48, 0, "warm-up"),
        (3, 47, 0, None),
        (3, 3, 0, None),
        (3, 2, 0, "tail"),
        (3, 1, 0, "tail"),
        (3, 0, 0, "tail"),
        (3, None, 0, None),
        (9, 20, 3, None),
        (9, 20, 4, "longest run"),
        (9, None, 5, "longest run"),
        (0, 1, 4, "warm-up"),  # the first reason that holds is the one told
    ],
)
def test_reason_to_compute(seen: int, remaining: int | None, skips: int, reason: str | None) -> None:
    assert must_compute(CACHE, seen, remaining, skips) == reason


def test_without_limits_only_the_first_step_is_forced() -> None:
    free = BlockCache(warmup=1, tail=0, max_skips=None)
    assert must_compute(free, 0, 9, 0) == "warm-up"
    assert must_compute(free, 1, 1, 10**6) is None
