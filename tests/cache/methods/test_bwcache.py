"""BWCache: runs of skipped steps and the computed tail, worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from dit_accel.cache.gate import GateState, decide, run_length
from dit_accel.cache.methods.bwcache import OPEN_SORA_THRESHOLDS, cache
from dit_accel.cache.schedule import must_compute

Replay = Callable[..., str]
Change = Callable[[int, bool], float | None]


def always(change: float) -> Change:
    """Every computed step but the first measures the same change, which is known one step later."""
    return lambda step, was_computed: change if was_computed and step > 1 else None


def test_length_of_a_run() -> None:
    assert [run_length(0.1, steps) for steps in (4, 30, 50)] == [1, 3, 5]


def test_replay_by_hand(replay: Replay) -> None:
    # 30 steps, runs of 3. Steps 0 and 1 are computed, 1 measures: 2, 3, 4 skipped, 5 computed, 6, 7, 8 skipped, ...
    # The first run begins with 28 steps left: the last 14 (from 16 on) are computed, so the run of 14, 15 and 16 is cut
    assert replay(cache(), always(0.1), steps=30) == "CC" + "...C" * 3 + ".." + "C" * 14
    assert replay(cache(), always(0.15), steps=30) == "C" * 30, "as large as the threshold is too large"
    assert replay(cache(0.0), always(0.0), steps=30) == "C" * 30


def test_the_tail_is_reckoned_from_the_first_run(replay: Replay) -> None:
    # Only step 9 measures little: 10, 11, 12 skipped. It began with 20 steps left, so from 20 on all is computed; 13
    # and 14 measure much, 15 little: 16, 17, 18 skipped; 19 measures little, but 20 is of the tail
    little = {9, 15, 19, 23}

    def change(step: int, was_computed: bool) -> float | None:
        return (0.1 if step - 1 in little else 0.9) if was_computed and step > 1 else None

    assert replay(cache(), change, steps=30) == "C" * 10 + "...CCC...C" + "C" * 10


def test_without_a_run_there_is_no_tail() -> None:
    assert must_compute(cache(), 29, 1, 0, gate=GateState()) is None
    assert must_compute(cache(), 29, 1, 0, gate=GateState(first_skip=2)) == "tail"


@pytest.mark.parametrize("change", [math.nan, math.inf, None])
def test_what_is_not_finite_computes(change: float | None) -> None:
    assert decide(cache(), GateState(first_skip=4), change, 8, 30).compute


def test_the_published_threshold_is_the_slow_one() -> None:
    assert cache().threshold == OPEN_SORA_THRESHOLDS[0]
    assert cache().scope.carrier == "output"
